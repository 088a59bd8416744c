"""Files and flags of any content: each is used, or one ValueError names it, without delay."""

import json
import string
import time
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dschat.config.dpo import DPOConfig
from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.config.reward import RewardConfig
from dschat.config.sft import SFTConfig
from dschat.data import sources
from dschat.data.datasets import PairDataset, PromptDataset, SFTDataset
from dschat.data.forms import read_row
from dschat.data.prompt_files import read_rows
from dschat.data.row import Row
from dschat.data.sources import load_source
from dschat.data.splits import Assignment, parse_shares, share_sizes
from dschat.data.templates import TextFormat
from dschat.data.text_checks import MAX_TEXT_BYTES
from dschat.runtime.manifest import content_fault, file_entry, read_manifest, write_manifest
from tests.unit.data_helpers import CHAT_TEMPLATE, make_tokenizer

QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)
TEXTS = st.text(max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "x"]) | VALUES,
            "content": VALUES,
        },
    ),
    max_size=4,
)
FIELDS = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "response", "messages", "more"]),
    VALUES | MESSAGES,
    max_size=5,
)
GOOD = {"prompt": "a", "chosen": " b", "rejected": " c"}
# White space, controls, zero-width characters, direction marks, fillers, a variation selector, and
# a tag.
UNSEEN = (
    " \t\r\n\x00\x1f\x7f\x85\xa0\xad\u034f\u061c\u115f\u1160\u180e\u2003\u200b\u200d\u200e\u2028"
    "\u202e\u2060\u2800\u3000\u3164\ufe0f\ufeff\uffa0\U000e0020\U000e0100"
)
# The name of a field in messages, and a row with a given text in that field.
FIELDS_OF_TEXT = {
    "prompt": lambda text: {**GOOD, "prompt": text},
    "chosen": lambda text: {**GOOD, "chosen": text},
    "rejected": lambda text: {**GOOD, "rejected": text},
    "response": lambda text: {"prompt": "a", "response": text},
    "prompt[0].content": lambda text: {**GOOD, "prompt": [{"role": "user", "content": text}]},
    "messages[0].content": lambda text: conversation(text, "b", "c"),
    "messages[1].content": lambda text: conversation("a", text, "c"),
    "messages[2].content": lambda text: conversation("a", "b", text),
    "messages[3].content": lambda text: conversation("a", "b", "c", text),
}


def conversation(*texts: str) -> dict:
    """Return a row of messages, alternately of the user and the assistant."""
    messages = []
    for i, text in enumerate(texts):
        role = "user" if i % 2 == 0 else "assistant"
        messages.append({"role": role, "content": text})
    return {"messages": messages}


@given(raw=FIELDS)
@QUICK
def test_fields_of_any_kind_make_a_row_or_an_error(raw):
    try:
        row = read_row(raw)
    except ValueError as error:
        assert str(error)
        return
    if isinstance(row.prompt, str):
        texts = [row.prompt]
    else:
        texts = [message["content"] for message in row.prompt if message["content"]]
    texts += [answer for answer in (row.chosen, row.rejected) if answer is not None]
    for text in texts:
        assert isinstance(text, str)
        text.encode("utf-8")
        assert not set(text) <= set(UNSEEN)
    assert row.rejected is None or row.rejected != row.chosen


@given(
    lines=st.lists(
        st.binary(max_size=30) | FIELDS.map(lambda raw: json.dumps(raw).encode()), max_size=5
    ),
    skip=st.booleans(),
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@QUICK
def test_any_file_is_read_or_named_in_an_error(tmp_path_factory, suffix, lines, skip):
    path = tmp_path_factory.mktemp("any") / f"rows{suffix}"
    path.write_bytes(b"\n".join(lines))
    try:
        source = load_source(str(path), skip_bad_rows=skip)
    except ValueError as error:
        assert "rows" + suffix in str(error)
        return
    tokenizer = make_tokenizer()
    assert source.eval is None
    for number in range(len(source.train)):
        row = source.row(source.train, number)
        assert row.place
        check_items(row, tokenizer)


def check_items(row: Row, tokenizer) -> None:
    """Check that every dataset gives items within the length limit."""
    options = dict(prompt_format="human_assistant")
    ending = dict(max_seq_len=12, end_token_id=tokenizer.eos_token_id)
    sets = [PromptDataset([row], tokenizer, max_prompt_len=12, **options)]
    if row.chosen:
        sets.append(SFTDataset([row], tokenizer, **ending, **options))
    if row.rejected:
        sets.append(PairDataset([row], tokenizer, **ending, **options))
    for dataset in sets:
        item = dataset[0]
        for name in ("input_ids", "chosen_ids", "rejected_ids"):
            assert name not in item or 0 < len(item[name]) <= 12


@given(
    good=st.integers(0, 6),
    more=st.integers(0, 6),
    bad=st.sampled_from(['{"prompt"', "7", "{}", '{"prompt": 1.5}', "\\"]),
)
@QUICK
def test_the_line_of_a_fault_is_exact(tmp_path_factory, good, more, bad):
    path = tmp_path_factory.mktemp("line") / "rows.jsonl"
    path.write_text("\n".join([json.dumps(GOOD)] * good + [bad] + [json.dumps(GOOD)] * more) + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line {good + 1}: ") as caught:
        load_source(str(path))
    assert "--skip_bad_rows" in str(caught.value) or not good + more
    if good + more > 1:
        source = load_source(str(path), skip_bad_rows=True)
        assert len(source.train) == good + more


def check_row_is_refused_or_left_out(folder, row: dict, *words: str) -> None:
    """Check that `row`, as line 2 of a file, raises ValueError with all `words`.

    With --skip_bad_rows, it must be left out and counted.
    """
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (GOOD, row, GOOD, GOOD)))
    with pytest.raises(ValueError) as caught:
        load_source(str(path))
    for word in ("rows.jsonl, line 2: ", *words, "--skip_bad_rows"):
        assert word in str(caught.value)
    with mock.patch.object(sources.logger, "warning") as warning:
        source = load_source(str(path), skip_bad_rows=True)
    assert len(source.train) == 3
    template, *values = warning.call_args[0]
    assert (template % tuple(values)).startswith("left out 1 bad rows of 4; the first: ")


@given(text=st.text(alphabet=UNSEEN, max_size=8))
@pytest.mark.parametrize("name", FIELDS_OF_TEXT)
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
def test_an_invisible_text_is_refused_or_left_out(tmp_path_factory, name, text):
    # An answer to an empty prompt can be learned, and the assistant may have called a tool.
    assume(not (name == "prompt" and text == ""))
    assume(not (name == "messages[1].content" and not text.strip()))
    words = (
        f'field "{name}" is empty ({" ".join(json.dumps(text).split())})',
        "it needs at least one word",
    )
    check_row_is_refused_or_left_out(
        tmp_path_factory.mktemp("unseen"), FIELDS_OF_TEXT[name](text), *words
    )


@given(unseen=st.text(alphabet=UNSEEN, max_size=4), trailing=st.booleans())
@QUICK
def test_answers_that_differ_only_in_invisible_characters_are_equal(unseen, trailing):
    rejected = f"b{unseen}" if trailing else f"{unseen}b"
    with pytest.raises(ValueError, match="no preference"):
        read_row({**GOOD, "rejected": rejected})


@pytest.mark.parametrize("text", ["", " \n"])
def test_empty_messages_of_system_and_assistant_are_allowed(text):
    messages = [{"role": "system", "content": text}, {"role": "user", "content": "a"}]
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "b"}]
    assert read_row({"prompt": messages}).prompt == messages
    messages[0]["content"] = "\u200b"
    with pytest.raises(ValueError, match=r'"prompt\[0\].content" is empty'):
        read_row({"prompt": messages})


@pytest.mark.parametrize("letter", ["x", "é", "文", "\U0001f600"])
@pytest.mark.parametrize("name", FIELDS_OF_TEXT)
def test_a_text_of_two_megabytes_is_refused_or_left_out(tmp_path, name, letter):
    text = letter * (2**21 // len(letter.encode()))
    started = time.monotonic()
    words = (
        f'field "{name}" has {len(text.encode()):,} bytes of text',
        "the limit is 1,000,000",
        "split it into rows",
    )
    check_row_is_refused_or_left_out(tmp_path, FIELDS_OF_TEXT[name](text), *words)
    assert time.monotonic() - started < 5


def test_the_lines_of_a_prompts_file_are_checked_too(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(f"a\n\n\u200b\u2060\n{'x' * 2**21}\n", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_rows(str(path), flag="--prompts_file")
    first, second = str(caught.value).splitlines()
    assert first.startswith(f'--prompts_file {path}, line 3: field "prompt" is empty')
    assert second.startswith(
        f'--prompts_file {path}, line 4: field "prompt" has 2,097,152 bytes of text'
    )


def test_the_longest_text_has_exactly_the_limit():
    longest = "x" * MAX_TEXT_BYTES
    assert read_row({**GOOD, "prompt": longest}).prompt == longest
    with pytest.raises(ValueError, match="has 1,000,001 bytes of text"):
        read_row({**GOOD, "prompt": longest + "x"})
    with pytest.raises(ValueError, match='"messages" has 1,000,002 bytes of text'):
        read_row(conversation(*["x" * (MAX_TEXT_BYTES // 3 + 1)] * 3))


@given(shares=st.text(alphabet="0123456789,.-/e ", max_size=12), rows=st.integers(1, 50))
@QUICK
def test_any_split_is_a_partition_or_an_error(shares, rows):
    try:
        parsed = parse_shares(shares)
    except ValueError as error:
        assert f"--data_split {shares}" in str(error)
        return
    assert sum(share_sizes(rows, parsed)) == rows
    labels = Assignment(1, 0).assign(np.arange(rows, dtype=np.uint64), parsed)
    assert [int((labels == step).sum()) for step in range(3)] == share_sizes(rows, parsed)


FLAGS = st.dictionaries(
    st.sampled_from(
        [
            "zero_stage",
            "max_seq_len",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "lora_dim",
            "num_train_epochs",
            "max_train_steps",
            "save_interval",
            "save_total_limit",
            "freeze_layers",
            "learning_rate",
            "weight_decay",
            "eval_fraction",
            "lora_alpha",
            "seed",
            "output_dir",
            "resume",
        ]
    ),
    st.integers(-3, 5)
    | st.floats(allow_nan=False, width=16)
    | st.text(string.ascii_letters, min_size=1, max_size=4),
    max_size=4,
)


@given(flags=FLAGS, config_class=st.sampled_from([SFTConfig, RewardConfig, DPOConfig, PPOConfig]))
@QUICK
def test_any_flags_make_a_configuration_or_an_error_that_names_one_of_them(flags, config_class):
    if config_class is PPOConfig:
        models = ["--actor_model_name_or_path=m", "--critic_model_name_or_path=m"]
    else:
        models = ["--model_name_or_path=m"]
    words = [f"--{name}={value}" for name, value in flags.items()]
    try:
        parse_config(config_class, models + words)
    except ValueError as error:
        assert any(f"--{name}" in str(error) for name in flags), error


@given(data=st.data(), sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4))
@QUICK
def test_any_damage_to_a_checkpoint_is_found(tmp_path_factory, data, sizes):
    folder = tmp_path_factory.mktemp("folder")
    (folder / "inner").mkdir()
    for number, size in enumerate(sizes):
        (folder / "inner" / f"{number}").write_bytes(bytes(range(256)) * (size // 256 + 1))
    names = [f"inner/{number}" for number in range(len(sizes))]
    write_manifest(folder, {name: file_entry(folder / name) for name in names})
    assert content_fault(folder, read_manifest(folder), names) == ""
    path = folder / data.draw(st.sampled_from(names))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    assert path.name in content_fault(folder, read_manifest(folder), names)
    path.write_bytes(content[:at])
    with pytest.raises(ValueError, match=path.name):
        read_manifest(folder)


SIZE = MAX_TEXT_BYTES - 100
SHAPES = {
    "one word": "x" * SIZE,
    "words": "word " * (SIZE // 5),
    "line ends": "\n\nHuman: a" + "\n" * (SIZE - 50) + "x\n\nAssistant:",
    "spaces": "\n\nHuman: a" + " " * (SIZE - 50) + "\n\nAssistant:",
    "turns": "\n\nHuman: a\n\nAssistant: b" * (SIZE // 30) + "\n\nHuman: a\n\nAssistant:",
    "brackets": "[(" * (SIZE // 2),
    "unseen": "\u200b" * (SIZE // 3) + "a",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_longest_prompt_is_cut_within_seconds(shape):
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    started = time.monotonic()
    row = read_row({"prompt": SHAPES[shape], "chosen": " yes"})
    for prompt_format in ("plain", "human_assistant", "chat"):
        assert TextFormat(prompt_format, tokenizer).render(row).prompt
    item = PromptDataset(
        [row],
        tokenizer,
        max_prompt_len=16,
        prompt_format="human_assistant",
        truncation="share",
    )[0]
    assert len(item["input_ids"]) == 16
    assert time.monotonic() - started < 20
