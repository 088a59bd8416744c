import pytest

from dschat.data.row import Row
from dschat.data.templates import TextFormat, parse_turns
from tests.unit.data_helpers import CHAT_TEMPLATE, make_tokenizer

DIALOGUE = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": " u1 "},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "u2"},
]
FORM = "s\n\nHuman: u1\n\nAssistant: a1\n\nHuman: u2\n\nAssistant:"
CHAT = "<s><system>s</><user> u1 </><assistant>a1</><user>u2</><assistant>"


# Tokens that end a turn in the templates below.
ENDS = ("</>", "<end>", "<|im_end|>", "<end_of_turn>", "<|eot_id|>")


def texts(row, prompt_format, chat_template=None, special=ENDS):
    tokenizer = make_tokenizer(chat_template=chat_template, special=special)
    rendered = TextFormat(prompt_format, tokenizer).render(row)
    return rendered.prompt, rendered.chosen, rendered.rejected


@pytest.mark.parametrize("prompt_format", ["plain", "auto"])
def test_plain_texts_are_unchanged(prompt_format):
    assert texts(Row(" p ", "c", None), prompt_format, CHAT_TEMPLATE) == (" p ", "c", None)


def test_human_assistant_of_strings_and_messages():
    assert texts(Row("p", "c", " r"), "human_assistant") == (
        "\n\nHuman: p\n\nAssistant:",
        " c",
        " r",
    )
    assert texts(Row(DIALOGUE, "c"), "human_assistant") == (FORM, " c", None)


def test_human_assistant_is_idempotent():
    once = texts(Row("p", "c", "r"), "human_assistant")
    assert texts(Row(*once), "human_assistant") == once
    turns = "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    for prompt in (FORM.removeprefix("s"), " Human: x Assistant:", turns):
        assert texts(Row(prompt, " c"), "human_assistant")[0] == prompt


def test_auto_takes_the_chat_template_for_messages_only_if_there_is_one():
    row = Row(DIALOGUE, " c ", "r")
    assert texts(row, "auto") == (FORM, " c ", " r")
    assert texts(row, "auto", CHAT_TEMPLATE) == (CHAT, " c ", "r")


def test_chat_of_strings():
    assert texts(Row(" p ", "c"), "chat", CHAT_TEMPLATE) == ("<s><user>p</><assistant>", "c", None)
    expected = "<s><user>u1</><assistant>a1</><user>u2</><assistant>"
    assert texts(Row(FORM.removeprefix("s"), "c"), "chat", CHAT_TEMPLATE)[0] == expected


def test_chat_answer_is_as_the_template_writes_it():
    llama = "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    llama += "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
    assert texts(Row("p", "c", "r"), "chat", llama) == ("[INST] p [/INST]", " c ", " r ")
    # The prompt contains the answer's words too: only those after the prompt count.
    assert texts(Row("yes", "yes"), "chat", llama) == ("[INST] yes [/INST]", " yes ", None)
    # Finished turns that do not begin with the generation prompt.
    thinks = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    thinks += "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    closed = "\n</think>\n\nc"
    assert texts(Row("p", "c"), "chat", thinks) == ("<user>p<assistant><think>", closed, None)
    numbered = "{% for m in messages %}<turn {{ loop.index }}>{{ m['content'] }}{% endfor %}"
    numbered += "{% if add_generation_prompt %}<turn>{% endif %}"
    assert texts(Row("p", "c"), "chat", numbered) == ("<turn 1>p<turn>", "c", None)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: the last answer begins with an empty block of thoughts, which the generation prompt
# lacks.
NO_THOUGHTS = "<think>\n\n</think>\n\n"
THINKING = CHATML.replace(
    "\n{{", "\n{% if loop.last and m['role'] == 'assistant' %}" + NO_THOUGHTS + "{% endif %}{{", 1
)
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
GENERATION = "{% if add_generation_prompt %}<assistant>{% endif %}"
DROPPING = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if loop.first %}{{ m['content'] }}{% endif %}<end>{% endfor %}" + GENERATION
)
SHOUTING = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | upper }}<end>{% endfor %}"
    + GENERATION
)


@pytest.mark.parametrize(
    "answer",
    ["d", "", "|", "s", "s>", "think", "end", "</think>", "\n", "aa", "<|im_end|>", "d d", "no"],
)
@pytest.mark.parametrize(
    "template, form",
    [
        (CHAT_TEMPLATE, "{}"),
        (CHATML, "{}"),
        (THINKING, NO_THOUGHTS + "{}"),
        (SPACED, " {} "),
        (CHATML.replace("m['content']", "m['content'] | trim"), "{}"),
    ],
    ids=["plain", "chatml", "thinking", "spaced", "trimming"],
)
def test_chat_answer_is_found_even_if_the_template_contains_its_words(template, form, answer):
    _, chosen, rejected = texts(Row("d", answer, answer + "d"), "chat", template)
    assert chosen == form.format(answer)
    assert rejected == form.format(answer + "d")


@pytest.mark.parametrize("template", [DROPPING, SHOUTING], ids=["dropping", "shouting"])
@pytest.mark.parametrize("answer", ["d", "end", "no"])
def test_an_answer_that_the_template_drops_or_changes_is_unchanged(template, answer):
    assert texts(Row("p", answer), "chat", template)[1] == answer


def test_parse_turns():
    assert parse_turns("Human: in prose") == [{"role": "user", "content": "Human: in prose"}]
    turns = parse_turns("\n\nHuman: a: b\n\nAssistant: c\nd\n\nHuman: e\n\nAssistant:")
    expected = [("user", "a: b"), ("assistant", "c\nd"), ("user", "e")]
    assert [(turn["role"], turn["content"]) for turn in turns] == expected
    assert parse_turns(" Human: x Assistant:") == [{"role": "user", "content": "x"}]


def test_errors_name_the_flag_and_the_row():
    with pytest.raises(
        ValueError, match="--prompt_format chat: the tokenizer .* has no chat template"
    ):
        texts(Row("p"), "chat")
    with pytest.raises(
        ValueError, match="f.jsonl, line 3: --prompt_format plain cannot show messages"
    ):
        texts(Row(DIALOGUE, place="f.jsonl, line 3"), "plain")
    refusing = "{{ raise_exception('system role not supported') }}"
    with pytest.raises(ValueError, match="f.jsonl, line 3: .*system role not supported"):
        texts(Row(DIALOGUE, place="f.jsonl, line 3"), "auto", refusing)


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages + 1 }}", "TypeError: can only concatenate list"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{{ messages.nothing.more }}", "has no attribute 'nothing'"),
        ("{% if", "unexpected 'end of template'"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_fails_is_named_with_the_row(template, words):
    with pytest.raises(
        ValueError, match="f.jsonl, line 3: the tokenizer's chat template refuses it"
    ) as caught:
        texts(Row("p", "c", place="f.jsonl, line 3"), "chat", template)
    assert words in str(caught.value)
