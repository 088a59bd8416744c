"""Saving models into the output folder, in one process without a process group."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dschat.checkpoint.save_model import save_model
from dschat.engine.zero import full_tensors, gathered, scale_parameter
from dschat.models.causal_lm import load_causal_lm
from dschat.models.lora import add_lora, lora_parameter_names
from dschat.models.tokenizer import load_tokenizer
from tests.unit.models_helpers import tiny


@pytest.fixture
def model_and_tokenizer():
    path = tiny("llama")
    return load_causal_lm(path, dtype=torch.float32), load_tokenizer(path)


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_saving_twice_keeps_other_files_of_the_folder(tmp_path, model_and_tokenizer):
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    (out / "evaluation").mkdir()
    (out / "evaluation" / "rollout_000000.jsonl").write_text("{}\n")
    (out / "generation_config.json").write_text("of an older model")
    model, tokenizer = model_and_tokenizer
    for factor in (1.0, 3.0):
        scale_parameter(model.lm_head.weight, factor)
        save_model(model, tokenizer, out)
        assert (out / "metrics.jsonl").read_text() == '{"step": 1}\n'
        assert (out / "evaluation" / "rollout_000000.jsonl").exists()
        saved = AutoModelForCausalLM.from_pretrained(out).state_dict()
        assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    assert files(tmp_path) == {"out"}


def test_a_failed_save_leaves_the_old_folder_whole(tmp_path, model_and_tokenizer, monkeypatch):
    out = tmp_path / "out"
    model, tokenizer = model_and_tokenizer
    save_model(model, tokenizer, out)
    (out / "metrics.jsonl").write_text("kept\n")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def half_done(self, folder, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", half_done)
    with pytest.raises(OSError, match="disk full"):
        save_model(model, tokenizer, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert files(tmp_path) == {"out"}


def test_adapters_are_merged_and_given_tensors_replace_the_weights(tmp_path, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    whole = {name: 2 * tensor for name, tensor in full_tensors(model).items()}
    save_model(model, tokenizer, tmp_path / "doubled", tensors=whole)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "doubled").state_dict()
    assert all(torch.equal(saved[name], 2 * tensor) for name, tensor in model.state_dict().items())

    add_lora(model, dim=2, alpha=4, only_optimize_lora=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for name in lora_parameter_names(model):
            model.get_parameter(name).normal_(std=0.1)
    ids = torch.arange(3, 13)[None]
    save_model(model, tokenizer, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-4)
        assert not torch.allclose(
            merged(ids).logits, AutoModelForCausalLM.from_pretrained(tiny("llama"))(ids).logits
        )


def test_full_tensors_are_copies_and_keep_ties(model_and_tokenizer):
    tied = load_causal_lm(tiny("opt"), dtype=torch.bfloat16)
    found = full_tensors(tied)
    assert set(found) == set(tied.state_dict()) and found["lm_head.weight"].dtype == torch.bfloat16
    embedding = found["model.decoder.embed_tokens.weight"]
    assert found["lm_head.weight"] is embedding
    before = embedding.clone()
    scale_parameter(tied.lm_head.weight, 2.0)
    assert torch.equal(embedding, before)
    assert torch.equal(full_tensors(tied)["lm_head.weight"], 2 * before)


def test_whole_parameters_need_no_gathering(model_and_tokenizer):
    model, _ = model_and_tokenizer
    with gathered(model.parameters(), modify=True):
        model.lm_head.weight.data.zero_()
    assert not model.lm_head.weight.any()
