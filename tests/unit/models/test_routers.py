"""Routers that are watched while the model computes."""

import pytest
import torch

from dschat.models.prepare import enable_checkpointing
from dschat.models.routers import RouterWatch
from dschat.trainers.router_loss import router_loss
from tests.tiny_families import tiny_family_model
from tests.unit.models_helpers import close

IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])


def gradients(*, checkpointing: bool) -> dict[str, torch.Tensor]:
    model = tiny_family_model("qwen3_moe").train()
    watch = RouterWatch(model, coef=1.0)
    if checkpointing:
        enable_checkpointing(model)
    with watch.recording():
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)  # as the reference of DPO does
        model(input_ids=IDS, use_cache=False)
    loss, _ = router_loss(watch, MASK)
    loss.backward()
    assert watch.take() == []  # recomputed layers are not recorded
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def test_the_loss_is_that_of_the_model_and_reaches_the_routers():
    found = gradients(checkpointing=False)
    model = tiny_family_model("qwen3_moe")
    expected = model(
        input_ids=IDS, attention_mask=MASK, output_router_logits=True, use_cache=False
    ).aux_loss
    expected.backward()
    assert torch.allclose(found["loss"], expected, atol=1e-5)
    name = "model.layers.0.mlp.gate.weight"
    assert found[name].abs().max() > 0
    assert close(found[name], model.get_parameter(name).grad, 1e-4)


def test_checkpointing_does_not_change_the_gradient():
    plain, recomputed = (gradients(checkpointing=value) for value in (False, True))
    assert set(plain) == set(recomputed) and len(plain) > 2
    assert all(torch.allclose(plain[name], recomputed[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe", "llama4_text"])
def test_routers_of_other_families_are_found(family):
    model = tiny_family_model(family)
    watch = RouterWatch(model, coef=1.0)
    with watch.recording():
        model(input_ids=IDS, use_cache=False)
    loss, load = router_loss(watch, MASK)
    assert loss.item() > 0 and 1 <= load.item() <= 4


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="--router_aux_loss_coef 0.01: LlamaForCausalLM has no"):
        RouterWatch(tiny_family_model("llama"), coef=0.01)
