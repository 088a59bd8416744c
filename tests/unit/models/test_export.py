import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

import dschat.models.export as export
from dschat.models.causal_lm import load_causal_lm
from dschat.models.export import save_pretrained_folder
from dschat.models.lora import add_lora, merged_state_dict
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer
from tests.unit.models_helpers import FAMILIES, OPT_350M_LIKE, close, random_texts, tiny

FP32 = torch.float32
IDS = random_texts((8,))[0][None]
# Each family as published, and two with the opposite tying of the head.
CASES = [(family, ()) for family in FAMILIES]
CASES += [("llama", (("tie_word_embeddings", True),)), ("opt", (("tie_word_embeddings", False),))]
CASES += [("opt", OPT_350M_LIKE)]


def load(path: str, dtype=FP32):
    tokenizer = load_tokenizer(path)
    return load_causal_lm(path, dtype=dtype, tokenizer=tokenizer).eval(), tokenizer


def full_copies(model) -> dict[str, torch.Tensor]:
    """Return tensors as an engine gathers them: copies, with a separate one for each tied name."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def reload(path, cls=AutoModelForCausalLM):
    model, info = cls.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("family, overrides", CASES)
def test_a_saved_model_loads_with_the_same_logits(family, overrides, tmp_path):
    model, tokenizer = load(tiny(family, overrides=overrides))
    expected = model(IDS).logits
    tensors = full_copies(model)
    names = set(tensors)
    save_pretrained_folder(model, tensors, tokenizer, tmp_path / "out")
    assert set(tensors) == names  # the caller's dict is unchanged
    again = reload(tmp_path / "out")
    assert torch.equal(again(IDS).logits, expected) and type(again) is type(model)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("Hi 1").input_ids
        == tokenizer("Hi 1").input_ids
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # nothing temporary is left
    mode = (tmp_path / "out").stat().st_mode
    assert not mode & 0o077 & ~0o755
    assert mode & 0o055


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_of_a_saved_model_have_the_mode_of_the_umask(mask, tmp_path):
    model, tokenizer = load(tiny("gpt2"))

    def write_more(folder):
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").touch(mode=0o600)

    before = os.umask(mask)
    try:
        save_pretrained_folder(
            model, full_copies(model), tokenizer, tmp_path / "out", write_more=write_more
        )
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 4
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~mask)}


@pytest.mark.parametrize("keep", ["embedding", "head"])
def test_a_tied_tensor_may_be_given_under_either_name(keep, tmp_path):
    model, tokenizer = load(tiny("gpt2"))
    expected = model(IDS).logits
    tensors = full_copies(model)
    del tensors["lm_head.weight" if keep == "embedding" else "transformer.wte.weight"]
    save_pretrained_folder(model, tensors, tokenizer, tmp_path / "out")
    assert torch.equal(reload(tmp_path / "out")(IDS).logits, expected)


def test_the_parameters_of_the_model_object_are_not_read(tmp_path):
    model, tokenizer = load(tiny("opt"))
    expected, tensors = model(IDS).logits, full_copies(model)
    for parameter in model.parameters():  # what ZeRO-3 leaves of a parameter
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    save_pretrained_folder(model, tensors, tokenizer, tmp_path / "out")
    assert torch.equal(reload(tmp_path / "out")(IDS).logits, expected)


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_an_adapted_model_is_saved_merged_while_training_continues(family, tmp_path):
    model, tokenizer = load(tiny(family))
    add_lora(model, dim=2, alpha=2.0, only_optimize_lora=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    expected = model(IDS).logits
    save_pretrained_folder(
        model, merged_state_dict(model, full_copies(model)), tokenizer, tmp_path / "out"
    )
    assert close(reload(tmp_path / "out")(IDS).logits, expected, 1e-4)
    assert torch.equal(model(IDS).logits, expected)
    with pytest.raises(ValueError, match="not part of the model: .*lora_A"):
        save_pretrained_folder(model, full_copies(model), tokenizer, tmp_path / "unmerged")


@pytest.mark.parametrize("as_wrapper", [True, False])
def test_a_reward_model_is_saved_with_or_without_its_wrapper(as_wrapper, tmp_path):
    tokenizer = load_tokenizer(tiny("gpt2"))
    model = load_reward_model(tiny("gpt2"), dtype=FP32, tokenizer=tokenizer).eval()
    saved = model if as_wrapper else model.model
    save_pretrained_folder(saved, full_copies(saved), tokenizer, tmp_path / "out")
    again = reload(tmp_path / "out", AutoModelForSequenceClassification)
    assert close(again(IDS).logits[0, 0], model(IDS, torch.ones_like(IDS))[0, -1], 1e-5)
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_the_configuration_has_the_dtype_of_the_tensors(tmp_path):
    model, tokenizer = load(tiny("llama"))
    tensors = {name: t.bfloat16() for name, t in full_copies(model).items()}
    save_pretrained_folder(model, tensors, tokenizer, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert reload(tmp_path / "out").dtype == torch.bfloat16 and model.config.dtype == FP32
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert (
            file.metadata()["format"] == "pt"
            and file.get_tensor("model.norm.weight").dtype == torch.bfloat16
        )


def test_large_models_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_SHARD_SIZE", "100KB")
    model, tokenizer = load(tiny("opt"))
    save_pretrained_folder(model, full_copies(model), tokenizer, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(reload(tmp_path / "out")(IDS).logits, model(IDS).logits)
    monkeypatch.undo()
    save_pretrained_folder(model, full_copies(model), tokenizer, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "not part of the model: extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            "another shape: model.norm.weight",
        ),
    ],
)
def test_wrong_tensors_leave_the_old_folder_unchanged(change, message, tmp_path):
    model, tokenizer = load(tiny("llama"))
    save_pretrained_folder(model, full_copies(model), tokenizer, tmp_path / "out")
    tensors = full_copies(model)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        save_pretrained_folder(model, tensors, tokenizer, tmp_path / "out")
    assert torch.equal(reload(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_tied_tensors_that_differ_are_refused(tmp_path):
    model, tokenizer = load(tiny("opt"))
    tensors = full_copies(model)
    tensors["lm_head.weight"] += 1
    with pytest.raises(
        ValueError, match="lm_head.weight and model.decoder.embed_tokens.weight are one tensor"
    ):
        save_pretrained_folder(model, tensors, tokenizer, tmp_path / "out")


def test_a_crash_while_writing_keeps_the_old_model(tmp_path, monkeypatch):
    model, tokenizer = load(tiny("llama"))
    save_pretrained_folder(model, full_copies(model), tokenizer, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    tensors = {name: t + 1 for name, t in full_copies(model).items()}

    def disk_full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", disk_full)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained_folder(model, tensors, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    rename = Path.rename

    def fails_onto_out(self, target):
        if target == tmp_path / "out" and self.suffix == ".tmp":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_onto_out)
    with pytest.raises(OSError, match="no"):
        save_pretrained_folder(model, tensors, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_metrics_and_logs_stay_and_old_weights_are_removed(tmp_path):
    model, tokenizer = load(tiny("llama"))
    out = tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    (out / "runs" / "events").write_text("e")
    (out / "metrics.jsonl").write_text("{}\n")
    (out / "pytorch_model.bin").write_text("old")
    (out / "config.json").write_text("old")
    # A writer that is still open keeps its file.
    with open(out / "metrics.jsonl", "a") as open_file:
        save_pretrained_folder(model, full_copies(model), tokenizer, out)
        open_file.write("more")
    assert (out / "metrics.jsonl").read_text() == "{}\nmore"
    assert (out / "runs" / "events").read_text() == "e"
    assert not (out / "pytorch_model.bin").exists()
    assert reload(out) is not None
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def saved_generation_config(path) -> dict:
    config = json.loads((path / "generation_config.json").read_text())
    config.pop("transformers_version")
    return config


def test_the_generation_config_can_be_saved(tmp_path):
    model, tokenizer = load(tiny("llama", pad_is_eos=True))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    save_pretrained_folder(model, full_copies(model), tokenizer, tmp_path / "out")
    assert {k: v for k, v in saved_generation_config(tmp_path / "out").items() if k in ids} == ids

    # Sampling values with do_sample=False, as in some published models: transformers refuses to
    # save them.
    model.generation_config = GenerationConfig(
        do_sample=False, temperature=0.6, top_p=0.9, eos_token_id=[2, 7]
    )
    save_pretrained_folder(model, full_copies(model), tokenizer, tmp_path / "out")
    saved = saved_generation_config(tmp_path / "out")
    assert saved["eos_token_id"] == [2, 7] and "temperature" not in saved and "top_p" not in saved
    assert model.generation_config.temperature == 0.6  # the model in use is unchanged

    own = GenerationConfig(do_sample=True, temperature=0.6, max_new_tokens=50)
    save_pretrained_folder(
        model, full_copies(model), tokenizer, tmp_path / "out", generation_config=own
    )
    saved = saved_generation_config(tmp_path / "out")
    assert saved["temperature"] == 0.6 and saved["do_sample"] and saved["max_new_tokens"] == 50
    assert saved["eos_token_id"] == 2 and own.eos_token_id is None


def test_without_a_generation_config_all_end_ids_of_the_configuration_are_kept(tmp_path):
    folder = shutil.copytree(tiny("llama"), tmp_path / "in")
    (folder / "generation_config.json").unlink()
    model, tokenizer = load(str(folder))
    model.config.eos_token_id = [2, 7]
    save_pretrained_folder(model, full_copies(model), tokenizer, tmp_path / "out")
    saved = saved_generation_config(tmp_path / "out")
    assert saved["eos_token_id"] == [2, 7] and not saved.get("_from_model_config")


def test_an_added_end_token_ends_generation_after_loading(tmp_path):
    tokenizer = load_tokenizer(tiny("llama"), add_eot_token=True)
    model = load_causal_lm(tiny("llama"), dtype=FP32, tokenizer=tokenizer)
    save_pretrained_folder(model, full_copies(model), tokenizer, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(
        tmp_path / "out"
    ).generation_config.eos_token_id == [2, 259]
