import re

import pytest
import torch

from dschat.models.causal_lm import load_causal_lm
from dschat.models.lora import (
    adapters_disabled,
    add_lora,
    has_lora,
    lora_layers,
    lora_parameter_names,
    merged_state_dict,
)
from dschat.models.prepare import freeze_lower_layers
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer
from tests.unit.models_helpers import FAMILIES, close, random_texts, tiny

FP32 = torch.float32
LAYERS_PER_BLOCK = {"opt": 6, "llama": 7, "gpt2": 4, "gpt_neox": 4, "qwen2": 7, "mistral": 7}
IDS = random_texts((8,))[0][None]


def load(family: str, dtype=FP32):
    return load_causal_lm(tiny(family), dtype=dtype, dropout=0.0).eval()


def randomize_lora_b(model, *, seed: int = 0) -> None:
    """Set B to random values, so that the adapters change the output as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def trainable(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_decoder_layers_are_adapted_and_nothing_else(family):
    model = load(family)
    before = model(IDS).logits
    kind = type(model)
    assert not has_lora(model) and lora_parameter_names(model) == set()
    number = add_lora(model, dim=2, alpha=1.0, only_optimize_lora=True)
    assert number == 2 * LAYERS_PER_BLOCK[family] and has_lora(model) and type(model) is kind
    assert torch.equal(model(IDS).logits, before)  # B is zero
    names = lora_parameter_names(model)
    assert len(names) == 2 * number
    assert names == trainable(model)
    assert all("lora_" in name for name in names)
    adapted = set(lora_layers(model))
    assert not any("head" in name or "embed" in name for name in adapted)


def test_the_scale_is_alpha_over_dim():
    model = load("llama")
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.weight.detach().clone()
    add_lora(model, dim=4, alpha=3.0, module_name="q_proj", only_optimize_lora=True)
    randomize_lora_b(model)
    layer = model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert close(layer(x), x @ (before + 0.75 * b @ a).T, 1e-5)


@pytest.mark.parametrize(
    "family, name, number",
    [("opt", "decoder.layers.", 12), ("llama", "layers.1.mlp", 3), ("gpt2", "c_attn", 2)],
)
def test_a_module_name_selects_the_layers(family, name, number):
    model = load(family)
    assert add_lora(model, dim=2, alpha=1.0, module_name=name, only_optimize_lora=True) == number
    assert all(name in n for n in lora_parameter_names(model))


@pytest.mark.parametrize("name", ["decoder.layers.", "lm_head", "embed_tokens", "q_prj"])
def test_a_name_that_matches_nothing_is_an_error(name):
    with pytest.raises(
        ValueError,
        match=f"--actor_lora_module_name '{name}'.*down_proj.*q_proj.*model.layers.0.mlp",
    ):
        add_lora(
            load("llama"),
            dim=2,
            alpha=1,
            module_name=name,
            only_optimize_lora=True,
            prefix="--actor_",
        )


@pytest.mark.parametrize(
    "family, targets, number",
    [
        ("llama", ["q_proj", "v_proj"], 4),
        ("llama", ["layers.1.mlp.up_proj", "self_attn.q_proj"], 3),
        ("llama", ["all-linear"], 14),
        ("llama", [r"model\.layers\.1\..*(up|down)_proj"], 2),
        ("llama", [r".*layers\.[01]\.mlp.*", "q_proj"], 8),
        ("gpt2", ["c_attn"], 2),
        ("opt", ["fc1"], 2),
    ],
)
def test_target_modules_are_names_or_expressions(family, targets, number):
    model = load(family)
    found = add_lora(model, dim=2, alpha=1.0, target_modules=targets, only_optimize_lora=True)
    assert found == number == len(lora_layers(model))


@pytest.mark.parametrize("target", ["proj", "lm_head", "layers.1", "q_proj|k_proj", ".*query.*"])
def test_a_target_that_matches_nothing_is_an_error_beside_others_that_match(target):
    with pytest.raises(
        ValueError,
        match=f"--target_modules {re.escape(repr(target))}.*down_proj.*q_proj.*model.layers.0.mlp",
    ):
        add_lora(
            load("llama"),
            dim=2,
            alpha=1,
            target_modules=["v_proj", target],
            only_optimize_lora=True,
        )


def test_rslora_divides_alpha_by_the_root_of_the_rank():
    model = load("llama")
    add_lora(model, dim=4, alpha=3.0, use_rslora=True, only_optimize_lora=True)
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {1.5}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_only_optimize_lora_all_but_the_adapted_weights_train(family):
    model = load(family)
    add_lora(model, dim=2, alpha=1.0, only_optimize_lora=False)
    frozen = {name for name, _ in model.named_parameters()} - trainable(model)
    adapted = {f"{name}.base_layer.weight" for name in lora_layers(model)}
    assert frozen == adapted and len(frozen) == 2 * LAYERS_PER_BLOCK[family]


def test_frozen_layers_stay_frozen_in_either_order():
    model = load("llama")
    freeze_lower_layers(model, 1)
    add_lora(model, dim=2, alpha=1.0, only_optimize_lora=False)
    assert "model.embed_tokens.weight" not in trainable(model)
    lowest = {n for n in trainable(model) if "layers.0." in n}
    assert lowest == {n for n in lora_parameter_names(model) if "layers.0." in n}
    freeze_lower_layers(model, 1)
    assert not any("layers.0." in n for n in trainable(model))


@pytest.mark.parametrize("only_optimize_lora", [True, False])
def test_a_reward_model_trains_its_head_too(only_optimize_lora):
    model = load_reward_model(
        tiny("llama"), dtype=FP32, tokenizer=load_tokenizer(tiny("llama"))
    ).eval()
    mask = torch.ones_like(IDS)
    before = model(IDS, mask)
    assert add_lora(model, dim=2, alpha=1.0, only_optimize_lora=only_optimize_lora) == 14
    names = lora_parameter_names(model)
    assert all(name.startswith("model.model.layers.") for name in names) and len(names) == 28
    rest = trainable(model) - names
    assert rest == {"model.score.weight"} if only_optimize_lora else {"model.score.weight"} < rest
    assert torch.equal(model(IDS, mask), before)
    model(IDS, mask).sum().backward()
    assert model.model.score.weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16])
def test_adapters_have_the_dtype_of_their_weights(dtype):
    model = load("opt", dtype)
    add_lora(model, dim=2, alpha=1.0, only_optimize_lora=True)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_disabling_adapters_restores_the_first_model_and_keeps_requires_grad():
    model = load("gpt2")
    before = model(IDS).logits
    add_lora(model, dim=2, alpha=1.0, only_optimize_lora=True)
    randomize_lora_b(model)
    names = trainable(model)
    changed = model(IDS).logits
    assert not close(changed, before, 0.1)
    with pytest.raises(KeyError), adapters_disabled(model):
        assert torch.equal(model(IDS).logits, before) and trainable(model) == names
        with adapters_disabled(model):
            pass
        assert torch.equal(model(IDS).logits, before)
        raise KeyError
    assert torch.equal(model(IDS).logits, changed) and trainable(model) == names


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_equals_that_of_peft(family):
    model = load(family)
    plain_names = set(model.state_dict())
    add_lora(model, dim=2, alpha=3.0, only_optimize_lora=True)
    randomize_lora_b(model)
    wrapped = {name: t.clone() for name, t in model.state_dict().items()}
    logits = model(IDS).logits
    merged = merged_state_dict(model, wrapped)
    assert set(merged) == plain_names and "lora" not in "".join(merged)
    assert any("lora_" in name for name in wrapped)  # the caller's dict is unchanged
    fresh = load(family)
    fresh.load_state_dict(merged)
    assert close(fresh(IDS).logits, logits, 1e-4) and not close(
        load(family)(IDS).logits, logits, 0.1
    )
    for name, layer in lora_layers(model).items():
        layer.merge()
        assert close(merged[f"{name}.weight"], layer.base_layer.weight, 1e-6)


def test_merging_half_precision_rounds_once():
    model = load("llama", torch.bfloat16)
    add_lora(model, dim=2, alpha=1.0, module_name="q_proj", only_optimize_lora=True)
    randomize_lora_b(model)
    state = model.state_dict()
    merged = merged_state_dict(model, state)
    name = "model.layers.1.self_attn.q_proj"
    parts = ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    w, a, b = (state[f"{name}.{part}"].double() for part in parts)
    exact = (w + 0.5 * (b @ a)).float()
    assert merged[f"{name}.weight"].dtype == torch.bfloat16
    assert torch.equal(merged[f"{name}.weight"], exact.to(torch.bfloat16))
    assert torch.equal(model.state_dict()[f"{name}.base_layer.weight"].double(), w)


def test_merging_needs_every_tensor_and_does_not_change_plain_models():
    model = load("llama")
    assert merged_state_dict(model, {"a": torch.ones(1)}) == {"a": torch.ones(1)}
    add_lora(model, dim=2, alpha=1.0, module_name="q_proj", only_optimize_lora=True)
    state = dict(model.state_dict())
    del state["model.layers.1.self_attn.q_proj.lora_A.default.weight"]
    with pytest.raises(KeyError):
        merged_state_dict(model, state)
