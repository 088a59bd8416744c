"""Groups of a replica's linear layers that share a launch; tests/gpu tests the products."""

import torch
from torch import nn

from dschat.generation.kernels.linear import SkinnyLinear, plain_products, use_skinny_linears
from dschat.models.causal_lm import load_causal_lm
from dschat.models.structure import decoder_layers
from tests.unit.models_helpers import tiny


def test_layers_of_one_input_share_a_launch_and_keep_their_weights():
    model = load_causal_lm(str(tiny("llama")), dtype=torch.float32).eval()
    ids = torch.arange(3, 23).view(2, 10)
    expected, weights = model(input_ids=ids).logits, [p.data_ptr() for p in model.parameters()]
    _, layers = decoder_layers(model)
    use_skinny_linears(layers)
    assert [p.data_ptr() for p in model.parameters()] == weights
    assert torch.equal(model(input_ids=ids).logits, expected)
    attention, mlp = layers[0].self_attn, layers[0].mlp
    together = (attention.q_proj, attention.k_proj, attention.v_proj)
    assert attention.q_proj.launch.layers == together
    assert all(layer.launch is attention.q_proj.launch for layer in together)
    assert mlp.gate_proj.launch is mlp.up_proj.launch
    assert mlp.gate_proj.launch.layers == (mlp.gate_proj, mlp.up_proj)
    assert attention.o_proj.launch.layers == (attention.o_proj,)
    assert mlp.down_proj.launch.layers == (mlp.down_proj,)
    assert layers[1].self_attn.q_proj.launch is not attention.q_proj.launch
    assert type(model.lm_head) is nn.Linear and isinstance(mlp.down_proj, SkinnyLinear)


def test_layers_of_different_inputs_share_no_launch():
    layers = nn.ModuleList([nn.Module()])
    for name, width in (("q_proj", 4), ("k_proj", 4), ("v_proj", 6), ("gate_proj", 4)):
        layers[0].add_module(name, nn.Linear(width, 3))
    use_skinny_linears(layers)
    assert all(layer.launch.layers == (layer,) for layer in layers[0].children())


def test_plain_products_end_with_their_context():
    with plain_products():
        assert not SkinnyLinear.active
    assert SkinnyLinear.active
