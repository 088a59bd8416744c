import shutil
from types import SimpleNamespace

import pytest

from dschat.demo.tiny_models import byte_tokenizer
from dschat.models.tokenizer import (
    end_token_id,
    ensure_unambiguous_pad,
    eos_token_ids,
    load_tokenizer,
)
from tests.unit.models_helpers import FAMILIES, tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_tokenizer_gives_the_same_ids_and_decodes_to_the_text(family):
    tokenizer = load_tokenizer(tiny(family))
    for text in ("Human: 12 apples?\n\nAssistant: naïve 日本 \t ok", "  two  spaces . , don't"):
        assert tokenizer(text).input_ids[-3:] == byte_tokenizer()(text).input_ids[-3:]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer("a</s>").input_ids[-1] == 2
    starts_with_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert starts_with_bos == (family in ("opt", "llama", "mistral"))


def test_the_chat_template_is_saved():
    tokenizer = load_tokenizer(tiny("llama"))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert (
        tokenizer.apply_chat_template(messages, tokenize=False) == "[user]hi\n[assistant]yes</s>\n"
    )


def test_a_folder_without_vocabulary_is_an_error(tmp_path):
    shutil.copy(f"{tiny('llama')}/config.json", tmp_path)
    with pytest.raises(ValueError, match="--critic_model_name_or_path .* holds no tokenizer"):
        load_tokenizer(str(tmp_path), flag="--critic_model_name_or_path")


def test_a_missing_folder_is_an_error_that_names_the_flag(tmp_path):
    with pytest.raises(ValueError, match="--model_name_or_path .*nowhere' does not exist"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is a file"):
        load_tokenizer(f"{tiny('llama')}/config.json")


def test_pad_falls_back_to_eos_and_eos_is_required(tmp_path):
    tokenizer = byte_tokenizer(pad_is_eos=True)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "no_pad")
    assert load_tokenizer(str(tmp_path / "no_pad")).pad_token_id == 2
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no_eos")
    with pytest.raises(ValueError, match="--add_eot_token"):
        load_tokenizer(str(tmp_path / "no_eos"))


def test_the_added_end_of_text_token_ends_texts_in_every_later_step(tmp_path):
    tokenizer = load_tokenizer(tiny("llama"), add_eot_token=True, eot_token="<|endoftext|>")
    end = end_token_id(tokenizer, add_eot_token=True, eot_token="<|endoftext|>")
    assert end == 259 == tokenizer.eos_token_id
    assert tokenizer("a<|endoftext|>").input_ids[-1] == 259
    tokenizer.save_pretrained(tmp_path)
    assert (
        end_token_id(load_tokenizer(str(tmp_path)), add_eot_token=False, eot_token="<|endoftext|>")
        == 259
    )
    with pytest.raises(ValueError, match="--eot_token '<stop>'"):
        end_token_id(tokenizer, add_eot_token=True, eot_token="<stop>")


@pytest.mark.parametrize(
    "value, expected", [(7, (2, 7)), ([9, 2, 7], (2, 7, 9)), (None, (2,)), (2, (2,)), (0, (0, 2))]
)
def test_end_ids_are_those_of_the_configuration_and_the_tokenizer(value, expected):
    assert eos_token_ids(SimpleNamespace(eos_token_id=value), byte_tokenizer()) == expected


def test_the_padding_token_of_a_reward_model_occurs_in_no_text():
    tokenizer = byte_tokenizer()
    assert ensure_unambiguous_pad(tokenizer) == 0 and len(tokenizer) == 259  # already good
    assert (
        ensure_unambiguous_pad(tokenizer, end_ids=[0]) == 259
    )  # an id that ends texts is not usable
    tokenizer = byte_tokenizer(pad_is_eos=True)
    assert ensure_unambiguous_pad(tokenizer) == 259 and len(tokenizer) == 260
    assert tokenizer("a<|pad|>").input_ids[-1] == 259 and ensure_unambiguous_pad(tokenizer) == 259
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "</s>"  # the vocabulary's own padding token is found again
    assert ensure_unambiguous_pad(tokenizer) == 0 and len(tokenizer) == 259
