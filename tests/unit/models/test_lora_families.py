"""LoRA's default targets in every family of transformers."""

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper

from dschat.models.lora import (
    adapted_name,
    add_lora,
    log_lora,
    lora_coverage,
    lora_layers,
    low_rank_update,
    merged_state_dict,
)
from tests.tiny_families import COMMON, RARE, tiny_family_model
from tests.unit.models_helpers import close

FAMILIES = [*COMMON, *(pytest.param(family, marks=pytest.mark.slow) for family in RARE)]
IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_counts_and_merges(family):
    model = tiny_family_model(family)
    with torch.no_grad():
        before = model(input_ids=IDS, use_cache=False).logits
    add_lora(model, dim=2, alpha=4.0, only_optimize_lora=True)
    model(input_ids=IDS, use_cache=False).logits.float().logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        # Of an adapter whose layer is not called, or whose weight is read instead.
        assert (parameter.grad is not None) == (".lora_" in name), name
    assert not any("router" in name for name in lora_layers(model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        adapted = model(input_ids=IDS, use_cache=False).logits
        merged = tiny_family_model(family)
        merged.load_state_dict(merged_state_dict(model, model.state_dict()))
        found = merged(input_ids=IDS, use_cache=False).logits
    assert not close(adapted, before, 1e-2)
    assert close(found, adapted, 1e-3)


def test_the_share_of_the_adapted_weights_is_logged(caplog):
    caplog.set_level("INFO")
    dense = tiny_family_model("llama")
    add_lora(dense, dim=2, alpha=4.0, only_optimize_lora=True)
    assert lora_coverage(dense) == 1.0
    log_lora(dense, chosen=False)
    assert "adapts 100%" in caplog.text and "train without adapters" not in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_experts_have_adapters_and_routers_do_not(caplog):
    caplog.set_level("INFO")
    mixture = tiny_family_model("qwen2_moe")
    add_lora(mixture, dim=2, alpha=4.0, only_optimize_lora=True)
    adapted = {adapted_name(name, layer) for name, layer in lora_layers(mixture).items()}
    inner = "model.layers.1.mlp."
    assert {n.removeprefix(inner) for n in adapted if n.startswith(inner)} == {
        "experts.gate_up_proj",
        "experts.down_proj",
        *(f"shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    assert 0.95 < lora_coverage(mixture) < 1
    log_lora(mixture, chosen=False)
    assert "LoRA adapts 99%" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_scope_may_name_experts_alone():
    mixture = tiny_family_model("qwen3_moe")
    assert add_lora(mixture, dim=2, alpha=1.0, module_name="experts", only_optimize_lora=True) == 4
    assert {type(layer) for layer in lora_layers(mixture).values()} == {ParamWrapper}
    with pytest.raises(ValueError, match="'experts' matches no linear layer"):
        add_lora(
            tiny_family_model("qwen3_moe"),
            dim=2,
            alpha=1.0,
            module_name="experts",
            experts=False,
            only_optimize_lora=True,
        )


def test_each_expert_has_a_product_of_its_own():
    mixture = tiny_family_model("gpt_oss")
    add_lora(mixture, dim=2, alpha=6.0, module_name="down_proj", only_optimize_lora=True)
    layer = lora_layers(mixture)["model.layers.0.mlp.experts"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (4 * 2, 96) and b.shape == (64, 2 * 4)
    torch.nn.init.normal_(b, generator=torch.Generator().manual_seed(0))
    update = low_rank_update(layer, a, b, shape=torch.Size((4, 96, 64)))
    for expert in range(4):
        rows = a[2 * expert : 2 * expert + 2]
        columns = b[:, expert::4]
        # gpt-oss stores [experts, in, out].
        assert torch.allclose(update[expert], 3.0 * (columns @ rows).T, atol=1e-6)


def test_less_than_half_of_the_weights_is_a_warning(caplog):
    caplog.set_level("INFO")
    mixture = tiny_family_model("qwen3_moe")
    add_lora(mixture, dim=2, alpha=4.0, only_optimize_lora=False, experts=False)
    assert lora_coverage(mixture) < 0.5
    log_lora(mixture, chosen=False, prefix="--actor_")
    (record,) = [record for record in caplog.records if "LoRA" in record.message]
    assert record.levelname == "WARNING" and "--no_lora_experts" in record.message
    assert "% of all parameters train without adapters" in record.message
    caplog.clear()
    log_lora(mixture, chosen=True)
    assert caplog.records[0].levelname == "INFO"
