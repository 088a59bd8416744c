"""Rows of new tokens train beside LoRA, and every reader of the saved folders finds them."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dschat.checkpoint.save_model import save_model
from dschat.config.options import LoraOptions, SystemOptions
from dschat.models.adapters import ADAPTER_FOLDER
from dschat.models.causal_lm import load_causal_lm
from dschat.models.lora import adapters_disabled, lora_parameter_names, merged_state_dict
from dschat.models.new_tokens import new_token_ids, new_token_modules, train_new_tokens
from dschat.models.prepare import prepare_for_training
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer
from tests.tiny_families import COMMON, RARE, tiny_family_model
from tests.unit.models_helpers import close, random_texts, tiny

FAMILIES = [*COMMON, *(pytest.param(family, marks=pytest.mark.slow) for family in RARE)]
IDS = torch.tensor([[5, 260, 9, 263, 7, 260, 11]])
LORA = LoraOptions(lora_dim=2, only_optimize_lora=True)
NEW = dict(add_eot_token=True, eot_token="<|new|>")


def randomize(model, names) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for name in sorted(names):
            model.get_parameter(name).normal_(std=0.3)


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_rows_are_those_of_the_merged_matrices(family):
    model = tiny_family_model(family)
    before = logits(model)
    model.requires_grad_(False)
    assert train_new_tokens(model, [260, 263])
    assert torch.equal(logits(model), before)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == lora_parameter_names(model) and 1 <= len(names) <= 2
    model(input_ids=IDS, use_cache=False).logits.logsumexp(-1).mean().backward()
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in names)
    randomize(model, names)
    changed = logits(model)
    assert not close(changed, before, 1e-2)
    with adapters_disabled(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), changed)
    merged = tiny_family_model(family)
    merged.load_state_dict(merged_state_dict(model, model.state_dict()))
    assert close(logits(merged), changed, 1e-4)


def test_which_tokens_are_new():
    tokenizer = load_tokenizer(tiny("llama"))
    length = len(tokenizer)
    assert new_token_ids(tokenizer, rows=length + 5, added=[]) == []
    assert new_token_ids(tokenizer, rows=length, added=[3]) == [3]
    tokenizer.add_special_tokens(
        {"pad_token": "<|only pads|>", "additional_special_tokens": ["<>"]}
    )
    assert len(tokenizer) == length + 2
    pad = tokenizer.pad_token_id
    assert new_token_ids(tokenizer, rows=length, added=[]) == [2 * length + 1 - pad]


def trained(family: str, *, lora: LoraOptions = LORA, more_tokens: int = 0):
    """Return a model that has learned to end with a new token, its tokenizer and a text."""
    tokenizer = load_tokenizer(tiny(family), **NEW)
    tokenizer.add_tokens([f"<{n}>" for n in range(more_tokens)])
    model = load_causal_lm(tiny(family), dtype=torch.float32, tokenizer=tokenizer, dropout=0.0)
    names = prepare_for_training(model, lora=lora, system=SystemOptions())
    text = torch.cat([random_texts((8,))[0], torch.tensor([tokenizer.eos_token_id] * 2)])[None]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    before = logits(model, text).log_softmax(-1)[0, 7:9, text[0, -1]]
    for _ in range(12):
        model(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = logits(model, text).log_softmax(-1)[0, 7:9, text[0, -1]]
    assert (after > before + 1).all()
    return model, tokenizer, text, names


@pytest.mark.parametrize("family", ["llama", "opt"])  # untied and tied
@pytest.mark.parametrize("more_tokens", [0, 6])  # in rows that pad the vocabulary, and in new ones
def test_a_new_end_token_is_learned_and_found_in_the_adapter_folder(family, more_tokens, tmp_path):
    model, tokenizer, text, names = trained(family, more_tokens=more_tokens)
    end = tokenizer.eos_token_id
    assert model.new_token_ids == [end, *range(264, len(tokenizer))]
    assert model.get_input_embeddings().num_embeddings == (272 if more_tokens else 264)
    assert len(load_tokenizer(tiny(family))) == end
    assert len(list(new_token_modules(model))) == (1 if family == "opt" else 2)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names
    start = load_causal_lm(tiny(family), dtype=torch.float32, tokenizer=tokenizer)
    with adapters_disabled(model):
        assert close(logits(model, text), logits(start, text), 1e-5)
    save_model(model, tokenizer, tmp_path / "out")
    expected = logits(model, text)
    assert close(
        logits(load_causal_lm(str(tmp_path / "out"), dtype=torch.float32), text), expected, 1e-4
    )

    adapter = str(tmp_path / "out" / ADAPTER_FOLDER)
    found = load_tokenizer(adapter, **NEW)
    assert found.eos_token_id == end and found.added_ids == []
    again = load_causal_lm(adapter, dtype=torch.float32, tokenizer=found)
    assert close(logits(again, text), expected, 1e-4) and again.new_token_ids == []
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in again.state_dict().items())

    plain = AutoModelForCausalLM.from_pretrained(tiny(family))
    plain.resize_token_embeddings(len(found), pad_to_multiple_of=8, mean_resizing=False)
    by_peft = logits(PeftModel.from_pretrained(plain, adapter), text)
    # Padding rows of the vocabulary, which no token has, are not in the adapter.
    assert close(by_peft[..., : len(found)], expected[..., : len(found)], 1e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_modules_to_save_train_whole_and_are_in_the_adapter_folder(family, tmp_path):
    wanted = ["embed_tokens", "lm_head"] if family == "llama" else ["embed_tokens"]
    lora = LoraOptions(lora_dim=2, only_optimize_lora=True, modules_to_save=wanted)
    model, tokenizer, text, names = trained(family, lora=lora, more_tokens=6)
    matrices = {p for p in model.parameters() if p.requires_grad and p.shape[0] == 272}
    assert len(matrices) == len(wanted) and not list(new_token_modules(model))
    save_model(model, tokenizer, tmp_path / "out")
    adapter = str(tmp_path / "out" / ADAPTER_FOLDER)
    expected = logits(model, text)
    again = load_causal_lm(adapter, dtype=torch.float32, tokenizer=load_tokenizer(adapter))
    assert close(logits(again, text), expected, 1e-4) and again.new_token_ids == []
    plain = AutoModelForCausalLM.from_pretrained(tiny(family))
    plain.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8, mean_resizing=False)
    assert close(logits(PeftModel.from_pretrained(plain, adapter), text), expected, 1e-4)


def test_a_module_that_does_not_exist_is_an_error():
    lora = LoraOptions(lora_dim=2, only_optimize_lora=True, modules_to_save=["lm_head", "wte"])
    with pytest.raises(
        ValueError, match="--actor_modules_to_save 'wte' .*lm_head, model.embed_tokens, model.norm"
    ):
        prepare_for_training(
            load_causal_lm(tiny("llama"), dtype=torch.float32),
            lora=lora,
            system=SystemOptions(),
            role="actor",
        )


def test_a_reward_model_learns_a_new_end_token_too(tmp_path):
    tokenizer = load_tokenizer(tiny("llama"), **NEW)
    model = load_reward_model(tiny("llama"), dtype=torch.float32, tokenizer=tokenizer)
    names = prepare_for_training(model, lora=LORA, system=SystemOptions())
    assert [name for name in names if "new_tokens" in name] == [
        "model.model.embed_tokens.new_tokens.delta"
    ]
    randomize(model, names)
    ids = torch.tensor([[5, 6, tokenizer.eos_token_id]])
    save_model(model.model, tokenizer, tmp_path / "out")
    adapter = str(tmp_path / "out" / ADAPTER_FOLDER)
    again = load_reward_model(
        adapter, dtype=torch.float32, tokenizer=load_tokenizer(adapter), fresh_head=False
    )
    with torch.no_grad():
        expected = model(ids, None)
        assert close(again(ids, None), expected, 1e-4)


def test_frozen_embeddings_without_lora_train_new_rows_at_the_models_own_rate(tmp_path):
    tokenizer = load_tokenizer(tiny("opt"), **NEW)
    model = load_causal_lm(tiny("opt"), dtype=torch.float32, tokenizer=tokenizer)
    names = prepare_for_training(model, lora=LoraOptions(), system=SystemOptions(freeze_layers=1))
    assert names == set() and len(list(new_token_modules(model))) == 1
    randomize(model, lora_parameter_names(model))
    expected = logits(model)
    save_model(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out" / ADAPTER_FOLDER).exists()
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, 1e-4)
