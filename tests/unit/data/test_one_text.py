"""One conversation gives the same tokens in all steps, under the templates of real models."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dschat.data.datasets import IGNORED, PairDataset, PromptDataset, SFTDataset
from dschat.data.row import Row
from dschat.data.templates import HUMAN_ASSISTANT_TEMPLATE, TextFormat
from dschat.models.turn_end import split_turn_end
from tests.unit.data_helpers import EOS, make_tokenizer

SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<|Assistant|>",
    "<|User|>",
    "<think>",
    "</think>",
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = CHATML.replace(
    "{{ m['content'] }}<|im_end|>\n",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n",
)
# Opens a thought in front of every answer, and shows no earlier thoughts.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|Assistant|>{{ m['content'].split('</think>')[-1] }}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# Gives the last answer an empty thought if it has none, and shows no earlier thoughts.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] != 'assistant' %}"
    "{{ m['content'] }}{% else %}{% set parts = m['content'].split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' %}"
    "{% if m['reasoning_content'] %}{% set thought = m['reasoning_content'] %}{% endif %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n\n{{ m['content'] | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "marked": (MARKED, "<|im_end|>"),
    "r1": (R1, "</s>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
    "human_assistant": (HUMAN_ASSISTANT_TEMPLATE, "</s>"),
    "none": (None, "</s>"),
}
SINGLE = [{"role": "user", "content": "2 + 2?"}]
DIALOGUE = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "FIRST"},
    {"role": "user", "content": "two?"},
]


def tokenizer_of(template, special=SPECIAL):
    return make_tokenizer(bos=True, chat_template=template, special=special)


def items(row, tokenizer, **options):
    """Return the row as steps 1, 2 and 3 read it."""
    options = dict(prompt_format="auto", **options)
    sft = SFTDataset([row], tokenizer, max_seq_len=500, train_on="last", **options)[0]
    pair = PairDataset([row], tokenizer, max_seq_len=500, **options)[0]
    prompt = PromptDataset([row], tokenizer, max_prompt_len=500, **options)[0]
    return sft, pair, prompt


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [SINGLE, DIALOGUE], ids=["single", "dialogue"])
def test_all_steps_read_the_same_tokens(name, messages):
    template, end = TEMPLATES[name]
    tokenizer = tokenizer_of(template)
    sft, pair, prompt = items(Row(messages, "  four\n", "five"), tokenizer)
    num_prompt = len(prompt["input_ids"])
    assert sft["input_ids"][:num_prompt] == prompt["input_ids"]
    assert sft["input_ids"] == pair["chosen_ids"]
    assert pair["rejected_ids"][:num_prompt] == prompt["input_ids"]
    assert pair["num_prompt"] == num_prompt
    # The answer alone is learned, with its white space and its end.
    learned = [label for label in sft["labels"] if label != IGNORED]
    assert sft["labels"][:num_prompt] == [IGNORED] * num_prompt
    assert learned == sft["input_ids"][num_prompt:]
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert learned[-1] == pair["rejected_ids"][-1] == end_id
    assert "  four\n" in tokenizer.decode(learned)
    assert sft["input_ids"].count(tokenizer.bos_token_id) <= 1


# R1's shows no thoughts of a finished turn.
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("none", "r1")])
def test_an_item_is_what_the_template_writes(name):
    """Rendering the answered conversation at once gives the same tokens, up to the end."""
    template, _ = TEMPLATES[name]
    tokenizer = tokenizer_of(template)
    item = items(Row(DIALOGUE, "four", "five"), tokenizer)[0]
    turns = [*DIALOGUE, {"role": "assistant", "content": "four"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False).removeprefix("<s>")
    whole = tokenizer(text)["input_ids"]
    if name == "human_assistant":  # the one template here that ends no turn
        whole.append(EOS)
    assert item["input_ids"] == whole[: len(item["input_ids"])]
    assert tokenizer.decode(whole[len(item["input_ids"]) :]).strip() == ""


def test_chatml_on_a_base_model_without_its_tokens():
    """The end of the turn is learned as text, and then the tokenizer's end token."""
    tokenizer = tokenizer_of(CHATML, special=())
    assert split_turn_end(tokenizer) == (None, "<|im_end|>")
    sft, pair, _ = items(Row(SINGLE, "four", "five"), tokenizer)
    learned = [label for label in sft["labels"] if label != IGNORED]
    assert tokenizer.decode(learned) == "four<|im_end|></s>"
    assert pair["chosen_ids"] == sft["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_turn_of_the_assistant_is_learned(name):
    template, end = TEMPLATES[name]
    tokenizer = tokenizer_of(template)
    row = Row(DIALOGUE, "SECOND")
    item = SFTDataset([row], tokenizer, max_seq_len=500, prompt_format="auto")[0]
    runs = tokenizer.decode(
        [EOS + 1 if label == IGNORED else label for label in item["labels"]]
    ).split(tokenizer.decode([EOS + 1]))
    learned = [run for run in runs if run]
    ends = "" if name in ("none", "human_assistant") else end
    space = "" if template and name not in ("mistral", "human_assistant") else " "
    thought = {"qwen3": "<think>\n\n</think>\n\n", "r1": "</think>\n\n"}.get(name, "")
    expected = [f"{space}FIRST{ends}", f"{space}{thought}SECOND{end}"]
    # These show an earlier answer without the thought with which it would be generated.
    assert learned == (expected[1:] if name in ("qwen3", "r1") else expected)


def test_train_on():
    tokenizer = tokenizer_of(CHATML)

    def learned(row, train_on):
        data = SFTDataset(
            [row], tokenizer, max_seq_len=500, prompt_format="auto", train_on=train_on
        )
        return tokenizer.decode([label for label in data[0]["labels"] if label != IGNORED])

    row = Row(DIALOGUE, "SECOND")
    assert learned(row, "last") == "SECOND<|im_end|>"
    assert learned(row, "all_assistant") == "FIRST<|im_end|>SECOND<|im_end|>"
    assert learned(row, "all").startswith("<s><|im_start|>user\none?")
    first = [DIALOGUE[0], {**DIALOGUE[1], "learn": False}, DIALOGUE[2]]
    assert learned(Row(first, "SECOND"), "all_assistant") == "SECOND<|im_end|>"
    last = [{"role": "assistant", "content": "SECOND", "learn": False}]
    assert learned(Row(DIALOGUE, last), "all_assistant") == "FIRST<|im_end|>"
    with pytest.raises(ValueError, match="no turn in it is learned"):
        learned(Row(DIALOGUE, last), "last")


def test_thoughts():
    def learned(template, answer):
        tokenizer = tokenizer_of(template)
        sft, _, prompt = items(Row(SINGLE, answer, "other"), tokenizer)
        return tokenizer.decode(sft["input_ids"][len(prompt["input_ids"]) :])

    inline = "<think>\nHalf of 0?\n</think>\n\nyes"
    message = [{"role": "assistant", "content": "yes", "reasoning_content": "Half of 0?"}]
    for answer in (inline, message):
        # The prompt has opened the thought, so the answer does not open it again.
        assert learned(R1, answer) == "Half of 0?\n</think>\n\nyes</s>"
        assert learned(QWEN3, answer) == f"{inline}<|im_end|>"
        assert learned(CHATML, answer) == f"{inline}<|im_end|>"
        assert learned(None, answer) == f" {inline}</s>"
    assert learned(R1, "yes") == "</think>\n\nyes</s>"
    assert learned(QWEN3, "yes") == "<think>\n\n</think>\n\nyes<|im_end|>"


def test_a_system_prompt_is_shown_even_if_the_template_has_no_place_for_it():
    system = [{"role": "system", "content": "Be brief."}, *SINGLE]
    text = TextFormat("auto", tokenizer_of(GEMMA)).render(Row(system)).prompt
    assert "user\nBe brief.\n\n2 + 2?<end_of_turn>" in text
    text = TextFormat("auto", tokenizer_of(CHATML)).render(Row(system)).prompt
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_a_template_that_wants_alternation_refuses_the_row_by_name():
    twice = [*SINGLE, *SINGLE]
    with pytest.raises(ValueError, match="f.jsonl, line 2: .*roles must alternate"):
        TextFormat("auto", tokenizer_of(MISTRAL)).render(Row(twice, place="f.jsonl, line 2"))


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Aarhus"}}}
TOOL_TEMPLATE = "{% if tools %}[tools]{{ tools | tojson }}{% endif %}" + CHATML.replace(
    "<|im_end|>\n{% endfor %}",
    "{% for c in m['tool_calls'] or [] %}<call>{{ c['function'] | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}",
)


def test_tools_and_calls_are_shown_or_refused():
    answer = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    row = Row(SINGLE, answer, tools=TOOLS, place="f.jsonl, line 4")
    tokenizer = tokenizer_of(TOOL_TEMPLATE)
    rendered = TextFormat("auto", tokenizer).render(row)
    assert rendered.prompt.startswith('[tools][{"type": "function"')
    expected = '<call>{"name": "weather", "arguments": {"town": "Aarhus"}}'
    assert rendered.chosen == expected
    item = SFTDataset([row], tokenizer, max_seq_len=500, prompt_format="auto")[0]
    learned = [label for label in item["labels"] if label != IGNORED]
    assert tokenizer.decode(learned) == expected + "<|im_end|>"
    for template, words in ((CHATML, "tools"), (None, "tools or tool calls")):
        with pytest.raises(ValueError, match=f"f.jsonl, line 4: it has .*{words}"):
            TextFormat("auto", tokenizer_of(template)).render(row)
    called = Row([*SINGLE, *answer, {"role": "tool", "content": "rain"}], "It rains.")
    with pytest.raises(ValueError, match='a call of the function "weather"'):
        TextFormat("auto", tokenizer_of(CHATML)).render(called)


WORDS = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x2FF, blacklist_characters="<>[]|"),
    min_size=1,
    max_size=12,
).filter(lambda text: text.strip())


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=5).filter(lambda x: len(x) % 2), WORDS, WORDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_steps_agree_on_any_conversation(name, turns, chosen, rejected):
    tokenizer = tokenizer_of(TEMPLATES[name][0])
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    if chosen == rejected:
        rejected += "x"
    row = Row(messages, chosen, rejected)
    sft, pair, prompt = items(row, tokenizer)
    all_turns = SFTDataset([row], tokenizer, max_seq_len=500, prompt_format="auto")[0]
    num_prompt = len(prompt["input_ids"])
    assert sft["input_ids"] == pair["chosen_ids"] == all_turns["input_ids"]
    assert sft["input_ids"][:num_prompt] == prompt["input_ids"]
    assert pair["rejected_ids"][:num_prompt] == prompt["input_ids"]
    end_id = tokenizer.convert_tokens_to_ids(TEMPLATES[name][1])
    assert sft["labels"][-1] == pair["rejected_ids"][-1] == end_id
    for label, token in zip(all_turns["labels"], all_turns["input_ids"], strict=True):
        assert label in (IGNORED, token)
    learns_more = any(label != IGNORED for label in all_turns["labels"][:num_prompt])
    assert learns_more == (len(turns) > 1 and name not in ("r1", "qwen3"))
