"""LoRA's default targets in every family of transformers."""

import pytest
import torch

from dschat.models.lora import add_lora, log_lora, lora_coverage, lora_layers, merged_state_dict
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


def test_less_than_half_of_the_weights_is_a_warning(caplog):
    caplog.set_level("INFO")
    mixture = tiny_family_model("qwen3_moe")
    add_lora(mixture, dim=2, alpha=4.0, only_optimize_lora=False)
    layers = [name for name, _ in mixture.named_parameters() if "experts" in name]
    assert layers and lora_coverage(mixture) < 0.5
    log_lora(mixture, chosen=False, prefix="--actor_")
    (record,) = [record for record in caplog.records if "LoRA" in record.message]
    assert record.levelname == "WARNING" and "--actor_only_optimize_lora" in record.message
    assert "% of all parameters train without adapters" in record.message
    caplog.clear()
    log_lora(mixture, chosen=True)
    assert caplog.records[0].levelname == "INFO"
