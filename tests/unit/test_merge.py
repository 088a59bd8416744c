"""The merged model has no quantized rounding, although training had."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dschat.checkpoint.save_model import save_model
from dschat.engine.quantized import quantize_linears
from dschat.merge import main
from dschat.models.causal_lm import load_causal_lm
from dschat.models.lora import (
    adapted_layer_names,
    add_lora,
    lora_parameter_names,
    merged_state_dict,
)
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer
from tests.unit.models_helpers import tiny


def with_adapters(model):
    add_lora(model, dim=2, alpha=4, only_optimize_lora=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for name in sorted(lora_parameter_names(model)):
            model.get_parameter(name).normal_(std=0.1)
    return model


@pytest.mark.parametrize("reward", [False, True])
def test_the_adapter_of_a_quantized_run_is_merged_into_the_full_weights(tmp_path, reward, capsys):
    tokenizer = load_tokenizer(tiny("llama"))
    base = load_causal_lm(tiny("llama"), dtype=torch.float32)
    start = tiny("llama")
    if reward:
        start = str(tmp_path / "start")
        first = load_reward_model(tiny("llama"), dtype=torch.float32, tokenizer=tokenizer)
        save_model(first.model, tokenizer, start)
        base = load_reward_model(start, dtype=torch.float32, tokenizer=tokenizer).model
    base.name_or_path = start
    model = with_adapters(base)
    exact = {
        name: tensor.clone()
        for name, tensor in merged_state_dict(model, model.state_dict()).items()
    }
    quantize_linears(model, adapted_layer_names(model), "nf4")
    save_model(model, tokenizer, tmp_path / "out")
    main([str(tmp_path / "out" / "adapter"), str(tmp_path / "merged"), "--dtype", "fp32"])
    assert "saved" in capsys.readouterr().out
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    rounded, merged = (
        kind.from_pretrained(tmp_path / name, dtype="auto").state_dict()
        for name in ("out", "merged")
    )
    for name, tensor in exact.items():
        assert torch.allclose(merged[name], tensor, atol=1e-6), name
    changed = [name for name in exact if not torch.allclose(rounded[name], exact[name], atol=1e-3)]
    assert len(changed) == len(adapted_layer_names(model))


def test_a_model_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no adapter folder"):
        main([tiny("llama"), str(tmp_path / "merged")])
