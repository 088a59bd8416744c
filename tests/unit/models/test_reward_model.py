import json
import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from dschat.models.export import save_pretrained_folder
from dschat.models.reward_model import RewardModel, load_reward_model
from dschat.models.tokenizer import load_tokenizer
from tests.unit.models_helpers import FAMILIES, OPT_350M_LIKE, close, pad, random_texts, tiny

FP32 = torch.float32
CASES = [(family, pad_is_eos, ()) for family in FAMILIES for pad_is_eos in (False, True)]
CASES += [("opt", False, OPT_350M_LIKE), ("llama", True, (("tie_word_embeddings", True),))]


def load(path: str, *, seed: int = 0, **options):
    """Return a reward model of the folder `path` in eval mode, and its tokenizer."""
    tokenizer = load_tokenizer(path)
    torch.manual_seed(seed)
    return load_reward_model(path, dtype=FP32, tokenizer=tokenizer, **options).eval(), tokenizer


def score(model: RewardModel, texts, *, side: str, pad_id: int) -> torch.Tensor:
    """Return the values [B] at the last attended token, pooled row by row."""
    ids, mask = pad(texts, side=side, pad_id=pad_id)
    values = model(ids, mask)
    assert values.shape == ids.shape and values.dtype == FP32
    return torch.stack([values[row, mask[row].nonzero().max()] for row in range(len(texts))])


@pytest.mark.parametrize("family, pad_is_eos, overrides", CASES)
def test_transformers_gives_the_same_score(family, pad_is_eos, overrides, tmp_path):
    path = tiny(family, pad_is_eos=pad_is_eos, overrides=overrides)
    model, tokenizer = load(path)
    # Texts that end as responses do, with the end token inside too: if padding were eos, it would
    # move the score.
    end = torch.tensor([tokenizer.eos_token_id])
    texts = [torch.cat([text[:4], end, text[4:], end]) for text in random_texts()]
    save_pretrained_folder(model.model, model.model.state_dict(), tokenizer, tmp_path / "saved")

    plain, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    saved_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    pad_id = plain.config.pad_token_id
    assert not info["missing_keys"] and not info["unexpected_keys"] and plain.dtype == FP32
    assert saved_tokenizer.pad_token_id == pad_id
    assert pad_id not in (saved_tokenizer.eos_token_id, saved_tokenizer.bos_token_id)
    ids, mask = pad(texts, side="right", pad_id=pad_id)
    ours = score(model, texts, side="right", pad_id=pad_id)
    assert ours.std() > 0.05
    assert close(plain(input_ids=ids, attention_mask=mask).logits[:, 0], ours, 1e-5)
    alone = torch.stack([plain(input_ids=text[None]).logits[0, 0] for text in texts])
    assert close(alone, ours, 1e-5)
    # In our forward, loaded again, only the mask matters, not the side and the id of the padding.
    again, _ = load(str(tmp_path / "saved"), seed=1)
    for side, some_id in (("left", pad_id), ("right", 2), ("left", 7)):
        assert close(score(again, texts, side=side, pad_id=some_id), ours, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_beyond_the_embedding_are_read_as_the_last_one(family):
    model, tokenizer = load(tiny(family))
    last = model.model.get_input_embeddings().num_embeddings - 1
    assert last >= len(tokenizer) - 1
    ids, mask = torch.tensor([[5, last, 7, last, last]]), torch.ones(1, 5, dtype=torch.long)
    beyond = torch.tensor([[5, last + 1, 7, last, last + 1000]])
    assert torch.equal(model(beyond, mask), model(ids, mask))


def test_values_are_those_of_the_head_at_every_token():
    model, _ = load(tiny("llama"))
    ids, mask = pad(random_texts(), side="right", pad_id=0)
    hidden = model.model.model(ids, attention_mask=mask).last_hidden_state
    assert close(
        model(ids, mask)[mask.bool()], (hidden @ model.model.score.weight[0])[mask.bool()], 1e-5
    )
    moved = model(ids, mask, position_ids=torch.arange(9).expand(3, -1) * 3)
    assert not close(moved, model(ids, mask), 1e-3)  # given positions are used


def test_half_precision_values_are_fp32():
    tokenizer = load_tokenizer(tiny("opt"))
    model = load_reward_model(tiny("opt"), dtype=torch.bfloat16, tokenizer=tokenizer)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids = random_texts((5,))[0][None]
    assert model(ids, torch.ones_like(ids)).dtype == FP32


@pytest.mark.parametrize(
    "family, overrides, width", [("llama", (), 64), ("opt", (), 64), ("opt", OPT_350M_LIKE, 32)]
)
def test_a_fresh_head_depends_on_the_seed_and_the_width(family, overrides, width):
    path = tiny(family, overrides=overrides)
    heads = [load(path, seed=seed)[0].model.score.weight.detach() for seed in (0, 0, 1)]
    assert heads[0].shape == (1, width)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    expected = (width + 1) ** -0.5
    # With 64 or 128 draws, one sigma is 0.06 to 0.09.
    assert abs(torch.cat(heads[1:]).std().item() / expected - 1) < 0.2
    model, _ = load(path)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=FP32)
    for name, parameter in base.base_model.named_parameters():
        assert torch.equal(model.model.base_model.get_parameter(name), parameter)
    assert getattr(model.config, "init_std", None) == getattr(base.config, "init_std", None)
    assert getattr(model.config, "initializer_range", None) == getattr(
        base.config, "initializer_range", None
    )


def test_a_pad_id_among_the_end_ids_of_the_generation_config_is_not_used(tmp_path):
    folder = shutil.copytree(tiny("qwen2"), tmp_path / "chat")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    model, tokenizer = load(str(folder))
    assert model.config.pad_token_id == tokenizer.pad_token_id == 259
    assert model.config.vocab_size == 264 and load(tiny("qwen2"))[0].config.pad_token_id == 0


def test_a_full_vocabulary_grows_for_the_padding_token():
    model, tokenizer = load(str(tiny("llama", pad_is_eos=True, overrides=(("vocab_size", 259),))))
    assert len(tokenizer) == 260 and tokenizer.pad_token_id == 259 == model.config.pad_token_id
    assert model.config.vocab_size == 264 == model.model.get_input_embeddings().weight.shape[0]


@pytest.fixture
def classifier(tmp_path):
    """Return a function that writes a public reward model, with changes to it."""

    def write(*, drop: str = "", **changes) -> str:
        config = AutoConfig.from_pretrained(tiny("llama"), num_labels=changes.pop("num_labels", 1))
        model = AutoModelForSequenceClassification.from_config(config)
        tensors = {
            name: t for name, t in model.state_dict().items() if not drop or drop not in name
        }
        model.save_pretrained(tmp_path / "public", state_dict=tensors)
        load_tokenizer(tiny("llama")).save_pretrained(tmp_path / "public")
        return str(tmp_path / "public")

    return write


def test_public_reward_models_keep_their_head_or_are_refused(classifier):
    path = classifier()
    model, _ = load(path)
    plain = AutoModelForSequenceClassification.from_pretrained(path)
    assert torch.equal(model.model.score.weight, plain.score.weight)
    with pytest.raises(ValueError, match="missing: score.weight"):
        load(classifier(drop="score"))
    with pytest.raises(ValueError, match="missing: model.norm.weight"):
        load(classifier(drop="model.norm"))
    with pytest.raises(ValueError, match="--critic_model_name_or_path .* classifier with 3 labels"):
        load(classifier(num_labels=3), flag="--critic_model_name_or_path")


def test_a_model_without_a_value_head_is_refused_by_name():
    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1
    )
    with pytest.raises(ValueError, match="BertForSequenceClassification cannot be a reward model"):
        RewardModel(BertForSequenceClassification(config))
    model = load(tiny("llama"))[0].model
    # With a bias, dividing the weight would not divide the values.
    model.score = torch.nn.Linear(64, 1)
    with pytest.raises(
        ValueError, match="LlamaForSequenceClassification cannot be a reward model.*bias=True"
    ):
        RewardModel(model)


def deepspeed_chat_checkpoint(
    folder, family: str, *, change=lambda tensors: None, overrides: tuple = ()
) -> str:
    """Write a folder as DeepSpeed-Chat did: one .bin with rwtransformer.* and a v_head."""
    base = AutoModelForCausalLM.from_pretrained(
        tiny(family, overrides=overrides), dtype=FP32
    ).base_model
    tensors = {f"rwtransformer.{name}": t.half() for name, t in base.state_dict().items()}
    width = getattr(base.config, "word_embed_proj_dim", 64)
    tensors["v_head.weight"] = torch.randn(
        1, width, generator=torch.Generator().manual_seed(4)
    ).half()
    change(tensors)
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    config = base.config.to_dict() | {"n_embd": 64, "end_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    load_tokenizer(tiny(family)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "family, overrides", [("opt", ()), ("opt", OPT_350M_LIKE), ("llama", ()), ("gpt2", ())]
)
def test_deepspeed_chat_checkpoints_load(family, overrides, tmp_path):
    path = deepspeed_chat_checkpoint(tmp_path / "old", family, overrides=overrides)
    model, _ = load(path)
    saved = torch.load(f"{path}/pytorch_model.bin")
    ids, mask = pad(random_texts(), side="right", pad_id=0)
    base = (
        AutoModelForCausalLM.from_pretrained(tiny(family, overrides=overrides), dtype=FP32)
        .eval()
        .base_model
    )
    base.load_state_dict(
        {n[14:]: t.float() for n, t in saved.items() if n.startswith("rwtransformer.")}
    )
    expected = base(ids, attention_mask=mask).last_hidden_state @ saved["v_head.weight"][0].float()
    assert close(model(ids, mask)[mask.bool()], expected[mask.bool()], 1e-5)


def rename(tensors, old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("v_head.weight"), "missing: score.weight"),
        (
            lambda t: t.pop("rwtransformer.decoder.layers.1.fc1.bias"),
            "missing: model.decoder.layers.1.fc1.bias",
        ),
        (lambda t: t.update(extra=torch.zeros(1)), "not part of the model: extra"),
        (
            lambda t: t.update({"v_head.weight": torch.zeros(1, 5)}),
            "of another shape: score.weight",
        ),
        (
            lambda t: rename(
                t,
                "rwtransformer.decoder.layers.0.fc2.bias",
                "rwtransformer.decoder.layers.0.fc3.bias",
            ),
            "missing: model.decoder.layers.0.fc2.bias; "
            "not part of the model: model.decoder.layers.0.fc3.bias",
        ),
    ],
)
def test_deepspeed_chat_checkpoints_must_fit_to_the_last_tensor(change, message, tmp_path):
    path = deepspeed_chat_checkpoint(tmp_path / "old", "opt", change=change)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_buffers_that_old_transformers_saved_are_ignored(tmp_path):
    def change(tensors):
        tensors["rwtransformer.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    load(deepspeed_chat_checkpoint(tmp_path / "old", "llama", change=change))
