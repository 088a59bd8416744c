"""Damaged model folders give one message that names the file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dschat.demo.tiny_models import make_tiny_model
from dschat.memory.model_size import named_size
from dschat.models.causal_lm import load_causal_lm
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer

FLAG = "--model_name_or_path"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    return shutil.copytree(llama, tmp_path / "model")


def load(folder: Path):
    """Load the tokenizer, the sizes and the model in the order of a step."""
    tokenizer = load_tokenizer(str(folder))
    named_size(str(folder), flag=FLAG)
    return load_causal_lm(str(folder), dtype=torch.float32, tokenizer=tokenizer)


def check_refused(folder: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.startswith(f"{FLAG} {str(folder)!r}"), message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "[" * 100_000, b"\xff\xfe{"])
@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"],
)
def test_a_damaged_file_is_named(name, text, copy):
    (copy / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    check_refused(copy, name, "Copy it again")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": -4},
        {"vocab_size": "many"},
        {"num_attention_heads": 0},
        {"hidden_size": None},
        {"model_type": 7},
        {"model_type": "no-such"},
        {"num_hidden_layers": "x"},
    ],
)
def test_an_invalid_configuration_is_named(change, copy):
    known = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**known, **change}))
    check_refused(copy, "config.json")


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": "../model.safetensors"}}']
)
def test_a_damaged_index_is_named(text, copy):
    (copy / "model.safetensors").rename(copy.parent / "model.safetensors")
    (copy / "model.safetensors.index.json").write_text(text)
    check_refused(copy, "model.safetensors.index.json", "Copy it again")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("reward", [False, True])
def test_weights_that_are_not_finite_are_named(reward, value, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="norm.weight holds values that are no finite numbers in float32.*--dtype"
    ):
        if reward:
            load_reward_model(str(copy), dtype=torch.float32, tokenizer=load_tokenizer(str(copy)))
        else:
            load(copy)


def test_weights_too_large_for_fp16_are_named(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert load(copy)
    with pytest.raises(ValueError, match="no finite numbers in float16"):
        load_causal_lm(str(copy), dtype=torch.float16)


def adapter(llama: Path, folder: Path, tensors: dict | bytes | None, **config) -> Path:
    folder.mkdir()
    known = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    known |= {"base_model_name_or_path": str(llama), **config}
    (folder / "adapter_config.json").write_text(json.dumps(known))
    if isinstance(tensors, bytes):
        (folder / "adapter_model.safetensors").write_bytes(tensors)
    elif tensors is not None:
        save_file(
            {f"{Q_PROJ}.{name}.weight": tensor for name, tensor in tensors.items()},
            folder / "adapter_model.safetensors",
        )
    return folder


VALID = {"lora_A": torch.ones(4, 64), "lora_B": torch.ones(64, 4)}
ADAPTERS = {
    "another kind": (VALID, {"peft_type": "NOPE"}, "adapter_config.json cannot be used"),
    "damaged": (b"xx", {}, "its weights cannot be read"),
    "missing": (None, {}, "adapter_model.safetensors is missing"),
    "another width": ({**VALID, "lora_A": torch.ones(4, 7)}, {}, "has no place for"),
    "two ranks": ({**VALID, "lora_A": torch.ones(3, 64)}, {}, "has no place for"),
    "no rank": ({"lora_A": torch.ones(0, 64), "lora_B": torch.ones(64, 0)}, {}, "has no place for"),
    "half": ({"lora_A": VALID["lora_A"]}, {}, "has no place for"),
    "not numbers": (
        {**VALID, "lora_B": torch.full((64, 4), float("nan"))},
        {},
        "no finite numbers",
    ),
    "no base": (VALID, {"base_model_name_or_path": 7}, "has no base_model_name_or_path"),
}


def test_a_truncated_bin_file_is_named(llama, copy):
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        file.unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    whole = (copy / "pytorch_model.bin").read_bytes()
    (copy / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    check_refused(copy, "its weights cannot be read", "Give a whole copy")


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_does_not_fit_is_named(case, llama, tmp_path):
    tensors, config, words = ADAPTERS[case]
    check_refused(adapter(llama, tmp_path / "adapter", tensors, **config), words)


def test_a_valid_adapter_loads(llama, tmp_path):
    assert load(adapter(llama, tmp_path / "adapter", VALID)).merged_adapter


def test_a_model_and_an_adapter_in_one_folder_are_refused(llama, copy):
    shutil.copytree(adapter(llama, copy.parent / "adapter", VALID), copy, dirs_exist_ok=True)
    check_refused(copy, "config.json", "adapter_config.json", "Give each a separate folder")
