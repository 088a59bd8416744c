"""The Hybrid Engine over quantized weights: merged copies, or the packed weights themselves."""

import pytest
import torch

from dschat.engine.hybrid_engine import HybridEngine, PlainGenerator
from dschat.engine.quantized import QuantizedLinear, quantize_linears
from dschat.models.causal_lm import load_causal_lm
from dschat.models.lora import adapted_layer_names, add_lora, lora_parameter_names
from dschat.models.new_tokens import new_token_modules, train_new_tokens
from tests.graph_stand_ins import graphs_on_cpu, with_graphs
from tests.unit.generation.test_decoding import config, prompts, stand_in
from tests.unit.models_helpers import tiny


def quantized_engine(family: str, kind: str):
    model = load_causal_lm(tiny(family), dtype=torch.float32).eval()
    add_lora(model, dim=2, alpha=4, only_optimize_lora=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for name in lora_parameter_names(model):
            model.get_parameter(name).normal_(std=0.3)
    quantize_linears(model, adapted_layer_names(model), kind)
    return stand_in(model)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_attached_replicas_read_the_packed_weights(family, kind):
    engine = quantized_engine(family, kind)
    reads = prompts(3, 80, 20, 66)
    expected = PlainGenerator(engine).decode(*reads, config())
    attached = HybridEngine(engine, lora_mode="attach")
    layers = [m for m in attached.replica.model.modules() if isinstance(m, QuantizedLinear)]
    own = [m for m in engine.module.modules() if isinstance(m, QuantizedLinear)]
    assert attached.replica.copied_bytes == 0 and len(layers) == len(own) > 0
    assert {m.packed.data_ptr() for m in layers} == {m.packed.data_ptr() for m in own}
    merged = HybridEngine(engine, lora_mode="merge")
    assert merged.replica.copied_bytes > 0
    with graphs_on_cpu():
        captured = with_graphs(engine, lora_mode="attach")
        found = [g.decode(*reads, config()).tokens for g in (attached, merged, captured)]
        assert captured._decoder is not None
    width = expected.tokens.shape[1]
    for tokens in found:
        assert torch.equal(tokens[:, :width], expected.tokens)


def test_attached_replicas_follow_weights_that_move():
    engine = quantized_engine("opt", "nf4")
    reads = prompts(3, 80)
    hybrid = HybridEngine(engine, lora_mode="attach")
    before = hybrid.decode(*reads, config(eos_token_id=[])).tokens
    layer = next(m for m in engine.module.modules() if isinstance(m, QuantizedLinear))
    layer.packed.data = torch.zeros_like(layer.packed)
    layer.bias.data = layer.bias.data + 5.0
    after = hybrid.decode(*reads, config(eos_token_id=[])).tokens
    expected = PlainGenerator(engine).decode(*reads, config(eos_token_id=[])).tokens
    assert torch.equal(after, expected) and not torch.equal(after, before)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("lora_mode", ["attach", "merge"])
def test_replicas_share_the_trained_rows_of_new_tokens(family, lora_mode):
    engine = quantized_engine(family, "nf4")
    model = engine.module
    reads = prompts(3, 80)
    before = PlainGenerator(engine).decode(*reads, config(eos_token_id=[])).tokens
    new = before[:, -6:].unique().tolist()  # changed rows of tokens that are read and written
    train_new_tokens(model, new)
    for _, tokens in new_token_modules(model):
        torch.nn.init.normal_(tokens.delta, std=0.5)
    hybrid = HybridEngine(engine, lora_mode=lora_mode)
    expected = PlainGenerator(engine).decode(*reads, config(eos_token_id=[])).tokens
    found = hybrid.decode(*reads, config(eos_token_id=[])).tokens
    assert torch.equal(found, expected) and not torch.equal(found, before)
    own = [tokens for _, tokens in new_token_modules(hybrid.replica.model)]
    theirs = [tokens for _, tokens in new_token_modules(model)]
    assert len(own) == len(theirs) > 0
    assert all(a.delta.data_ptr() == b.delta.data_ptr() for a, b in zip(own, theirs, strict=True))
