"""Rewards: failing functions, weights, and reward models with another tokenizer."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from dschat.algorithms.types import PromptBatch
from dschat.data.row import Row
from dschat.demo.tiny_models import byte_tokenizer
from dschat.rewards.loading import load_function
from dschat.rewards.pool import WorkerPool
from dschat.trainers.rewards import (
    FunctionReward,
    ModelReward,
    RetokenisedReward,
    RewardFailure,
    WeightedRewards,
    check_critic_tokenizer,
    function_digest,
    metric_labels,
    reads_actor_tokens,
    same_tokens,
)
from dschat.trainers.rollout import SampledAnswers

PROMPTS = ["one", "two"]


class Dataset:
    rows = [Row("one", columns={"target": 1}), Row("two", columns={"target": 2})]

    def prompt_text(self, index):
        return self.rows[index].prompt

    def row(self, index):
        return self.rows[index]


def make_answers(texts=("ab", "c"), ended=(True, False)):
    """Return the texts as answers to the two prompts, with an EOS if the answer has ended."""
    tokenizer = byte_tokenizer()
    ids = [
        tokenizer(t, add_special_tokens=False)["input_ids"] + [2] * e for t, e in zip(texts, ended)
    ]
    prompt = torch.tensor([tokenizer(p, add_special_tokens=False)["input_ids"] for p in PROMPTS])
    longest = max(len(row) for row in ids)
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    mask = torch.arange(longest) < torch.tensor([[len(row)] for row in ids])
    ones = torch.ones_like(prompt)
    return SampledAnswers(
        prompts=PromptBatch(prompt, ones, torch.arange(2)),
        input_ids=torch.cat([prompt, tokens], -1),
        attention_mask=torch.cat([ones, mask.long()], -1),
        response_mask=mask,
        ended=torch.tensor(ended),
    )


def weighted(*functions, weights=(), on_error="stop"):
    rewards = [
        FunctionReward(f, f"{f.__name__}", on_error=on_error)
        if isinstance(f, types.FunctionType)
        else f
        for f in functions
    ]
    return WeightedRewards(rewards, list(weights), Dataset(), byte_tokenizer())


def test_a_function_gets_prompts_answers_and_the_columns_of_their_rows():
    seen = {}

    def function(prompts, answers, **columns):
        seen.update(prompts=prompts, answers=answers, **columns)
        return [0.5, 2]

    scores = weighted(function)(make_answers())
    assert scores.tolist() == [0.5, 2.0] and scores.dtype == torch.float32
    assert seen == {"prompts": PROMPTS, "answers": ["ab", "c"], "target": [1, 2]}


def test_several_rewards_are_a_weighted_sum():
    reward = weighted(
        lambda p, a, **c: [1.0, 2.0], lambda p, a, **c: [10.0, 20.0], weights=(2.0, -0.1)
    )
    assert reward(make_answers()).tolist() == [1.0, 2.0]


def failing(prompts, answers, **columns):
    if "two" in prompts:
        raise KeyError("no such key")
    return [0.0] * len(answers)


def ending(prompts, answers, **columns):
    sys.exit(0)


@pytest.mark.parametrize(
    "function,words",
    [
        (ending, ["SystemExit", "'one'"]),
        (lambda p, a, **c: [1.0, 10**400], ["1000", "'two'", "'c'"]),
        (failing, ["KeyError", "no such key", "'two'", "'c'"]),
        (lambda p, a, **c: [1.0], ["1 scores for 2 answers", "'one'"]),
        (lambda p, a, **c: None, ["NoneType", "'one'"]),
        (lambda p, a, **c: [1.0, float("nan")], ["nan", "'two'", "'c'"]),
        (lambda p, a, **c: [1.0, 1e39], ["1e+39", "'two'", "'c'"]),
        (lambda p, a, **c: [1.0, "good"], ["'good'", "'two'"]),
    ],
)
def test_a_failing_function_names_the_prompt_that_caused_it(function, words):
    with pytest.raises(RewardFailure) as caught:
        weighted(function)(make_answers())
    assert all(word in str(caught.value) for word in [f"--reward_fn {function.__name__}", *words])


def quiet(prompts, answers, **columns):
    return [None, 3]


def none_or_nan(prompts, answers, **columns):
    return [None if prompt == "one" else float("nan") for prompt in prompts]


def test_scalars_of_python_numpy_and_torch_are_scores_and_none_does_not_apply():
    def mixed(prompts, answers, **columns):
        return next(returns)

    returns = iter([[True, np.bool_(True)], [torch.tensor(0.5), torch.tensor([2])], [None, None]])
    reward = weighted(mixed, quiet)
    assert [reward(make_answers()).tolist() for _ in range(3)] == [[1, 4], [0.5, 5], [0, 3]]
    # mixed: 1 + 1 + 0.5 + 2 and two answers of six without a score; quiet: three times 0 + 3.
    assert reward.pop_metrics() == {
        "rewards/mixed": pytest.approx(4.5 / 6),
        "rewards_applied/mixed": pytest.approx(4 / 6),
        "rewards/quiet": 1.5,
        "rewards_applied/quiet": 0.5,
    }
    assert reward.pop_metrics() == {}


def test_a_reward_of_weight_0_is_a_judge():
    def judge(prompts, answers, **columns):
        return [1.0, 4.0]

    reward = weighted(judge, quiet, weights=(0, 1))
    assert reward(make_answers()).tolist() == reward(make_answers()).tolist() == [0.0, 3.0]
    metrics = reward.pop_metrics()
    assert (metrics["judges/judge"], metrics["judges_std/judge"]) == (2.5, 1.5)
    assert metrics["rewards/judge"] == 2.5 and "judges/quiet" not in metrics


def test_zero_gives_only_the_answers_that_fail_0_and_counts_them(caplog):
    def most(prompts, answers, **columns):
        assert columns["target"] == ([1, 2] if len(prompts) == 2 else [2 - ("one" in prompts)])
        return [4.0 + score for score in failing(prompts, answers)]

    reward = weighted(most, none_or_nan, weights=(1, 10), on_error="zero")
    assert reward(make_answers()).tolist() == reward(make_answers()).tolist() == [4.0, 0.0]
    assert reward.pop_metrics() == {
        "rewards/most": 2.0,
        "rewards_applied/most": 1.0,
        "rewards_failed/most": 0.5,
        "rewards/none_or_nan": 0.0,
        "rewards_applied/none_or_nan": 0.5,
        "rewards_failed/none_or_nan": 0.5,
    }
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    for word in ("--reward_fn most raised KeyError", "'two'", "'c'", "--on_reward_error zero"):
        assert word in messages[0]
    assert "--reward_fn none_or_nan returned nan for the prompt 'two'" in messages[1]


@pytest.mark.parametrize(
    "spec, word", [("numeric_match(column='gold')", "gold"), (None, "1 score")]
)
def test_zero_does_not_hide_a_fault_that_no_answer_causes(spec, word):
    function = load_function(spec) if spec else lambda p, a, **c: [1.0]
    with pytest.raises(RewardFailure, match=word):
        weighted(FunctionReward(function, "f", on_error="zero"))(make_answers())


def test_a_grader_is_a_reward_by_name():
    grader = FunctionReward(load_function("numeric_match"), "numeric_match")
    reward = weighted(grader)
    assert reward(make_answers(("is 1", "x"))).tolist() == [1.0, 0.0]
    assert reward.pop_metrics() == {
        "rewards/numeric_match": 0.5,
        "rewards_applied/numeric_match": 1.0,
    }
    assert function_digest("numeric_match") is None
    with pytest.raises(ValueError, match="--reward_fn nothing: there is no grader nothing"):
        load_function("nothing")


def test_a_python_object_is_known_by_its_source_and_cannot_be_named_by_a_flag():
    functions = {"object:failing": failing, "object:built": sum}
    digest = function_digest("object:failing", functions)
    assert digest is not None and digest != function_digest("object:other", {"object:other": quiet})
    assert function_digest("object:built", functions) is None
    with pytest.raises(ValueError, match="was given to PPOTrainer"):
        load_function("object:failing")


def test_a_reward_model_is_measured_by_name_only_beside_other_rewards():
    def engine(input_ids, attention_mask):
        return torch.ones(input_ids.shape)

    alone = weighted(ModelReward(engine, "out/reward/"))
    beside = weighted(ModelReward(engine, "out/reward/"), quiet)
    alone(make_answers())
    beside(make_answers())
    assert alone.pop_metrics() == {}
    assert beside.pop_metrics()["rewards/reward"] == 1.0


def test_metric_labels_are_short_and_distinct():
    names = ["org/RM 7B", "a/r.py:good", "b/r.py:good", "regex_match(pattern='a:b/c')"]
    assert metric_labels(names) == ["RM_7B", "good", "good_2", "regex_match"]


def test_the_search_for_the_answer_that_fails_has_a_time_limit(monkeypatch):
    monkeypatch.setattr("dschat.trainers.rewards.CULPRIT_SEARCH_S", -1.0)
    with pytest.raises(
        RewardFailure, match="no such key.*on 2 answers, the first of them to the prompt 'one'"
    ):
        weighted(failing)(make_answers())


def test_a_reward_model_that_gives_nan_is_named_with_its_prompt():
    def engine(input_ids, attention_mask):
        values = torch.zeros(input_ids.shape)
        values[1] = float("nan")
        return values

    with pytest.raises(RewardFailure, match="'c'.*'two'.*nan"):
        weighted(ModelReward(engine, "m"))(make_answers())


def test_a_model_on_the_actors_tokens_is_read_at_the_last_token_of_each_answer():
    def engine(input_ids, attention_mask):
        return input_ids.float()

    answers = make_answers()
    scores = weighted(ModelReward(engine, "m"))(answers)
    assert scores.tolist() == [
        2.0,
        float(byte_tokenizer()("c", add_special_tokens=False)["input_ids"][0]),
    ]


def test_another_tokenizer_reads_the_same_texts_with_an_eos_only_if_the_policy_ended():
    other = byte_tokenizer(pad_is_eos=True)
    other.padding_side = "right"
    seen = {}

    def engine(input_ids, attention_mask):
        seen["texts"] = [
            other.decode(row[mask.bool()]) for row, mask in zip(input_ids, attention_mask)
        ]
        return torch.arange(input_ids.shape[1]).float().expand(input_ids.shape)

    scores = weighted(RetokenisedReward(engine, "m", other, prompt_format="auto"))(make_answers())
    assert seen["texts"] == ["<s>oneab</s>", "<s>twoc"]
    assert scores.tolist() == [6.0, 4.0]


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    "prompt_format, text",
    # A chat template writes the start of a text itself; otherwise the tokenizer adds it.
    [
        ("auto", "<s>[user]hi[assistant]x"),
        ("chat", "<s>[user]hi[assistant]x"),
        ("human_assistant", "<s>\n\nHuman: hi\n\nAssistant: x"),
    ],
)
def test_messages_are_rendered_in_the_format_of_the_reward_model(prompt_format, text):
    other = byte_tokenizer()
    other.chat_template = TEMPLATE
    reward = RetokenisedReward(None, "m", other, prompt_format=prompt_format)
    assert other.decode(reward._ids(Row([{"role": "user", "content": "hi"}]), "x", False)) == text


def test_a_template_that_refuses_a_prompt_fails_with_the_name_of_the_model():
    other = byte_tokenizer()
    other.chat_template = "{{ raise_exception('no system here') }}"
    reward = RetokenisedReward(
        lambda input_ids, attention_mask: input_ids.float(), "m", other, prompt_format="chat"
    )
    with pytest.raises(
        RewardFailure,
        match="reward model m cannot read the prompt 'one'.*no system here.*--reward_prompt_format",
    ):
        weighted(reward)(make_answers())


def test_the_forward_runs_even_if_a_prompt_cannot_be_rendered():
    """Under ZeRO-3 the forwards of the other ranks wait for this one."""
    other = byte_tokenizer()
    other.chat_template = (
        "{% if messages[0]['content'] == 'two' %}{{ raise_exception('not two') }}{% endif %}"
        + TEMPLATE
    )
    seen = []

    def engine(input_ids, attention_mask):
        seen.append(
            [other.decode(row[mask.bool()]) for row, mask in zip(input_ids, attention_mask)]
        )
        return torch.zeros(input_ids.shape)

    with pytest.raises(RewardFailure, match="reward model m cannot read the prompt 'two'.*not two"):
        weighted(RetokenisedReward(engine, "m", other, prompt_format="chat"))(make_answers())
    assert seen == [["<s>[user]one[assistant]ab</s>", "</s>"]]


@pytest.mark.parametrize("change", ["nothing", "tokens", "eos", "template", "format"])
def test_a_reward_model_reads_the_actors_tokens_only_if_nothing_differs(change):
    tokenizer, other = byte_tokenizer(), byte_tokenizer()
    if change == "tokens":
        other = byte_tokenizer(pad_is_eos=True)
        other.add_tokens(["ab"])
        tokenizer.add_tokens(["cd"])
    elif change == "eos":
        other.eos_token = "a"
    elif change == "template":
        other.chat_template = TEMPLATE
    own = "human_assistant" if change == "format" else "auto"
    assert reads_actor_tokens(tokenizer, other, prompt_format="auto", reward_prompt_format=own) == (
        change == "nothing"
    )


def test_a_text_too_long_for_the_reward_model_is_cut_at_the_start():
    other = byte_tokenizer(pad_is_eos=True)
    seen = {}

    def engine(input_ids, attention_mask):
        seen["texts"] = [
            other.decode(row[mask.bool()]) for row, mask in zip(input_ids, attention_mask)
        ]
        return torch.zeros(input_ids.shape)

    weighted(RetokenisedReward(engine, "m", other, prompt_format="auto", max_tokens=4))(
        make_answers()
    )
    assert seen["texts"] == ["eab</s>", "twoc"]


def test_functions_may_return_numpy_scores():
    assert weighted(lambda p, a, **c: np.array([0.5, 1.5], dtype=np.float32))(
        make_answers()
    ).tolist() == [0.5, 1.5]
    assert weighted(lambda p, a, **c: [np.float32(0.5), np.int64(2)])(make_answers()).tolist() == [
        0.5,
        2.0,
    ]


def test_prompt_format_chat_uses_the_chat_template_of_the_reward_model():
    other = byte_tokenizer()
    seen = {}

    def engine(input_ids, attention_mask):
        seen["text"] = other.decode(input_ids[0][attention_mask[0].bool()])
        return torch.zeros(input_ids.shape)

    weighted(RetokenisedReward(engine, "m", other, prompt_format="chat"))(make_answers())
    assert seen["text"].startswith("<s>[user]one\n[assistant]ab")


def test_functions_load_from_a_file_or_the_error_says_why_not(tmp_path):
    file = tmp_path / "my reward.py"
    file.write_text("def score(prompts, answers, **columns):\n    return [1.0] * len(answers)\n")
    assert load_function(f"{file}:score")([], ["a"]) == [1.0]
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    ending = tmp_path / "ending.py"
    ending.write_text("raise SystemExit(0)\n")
    for name, word in [
        (f"{ending}:score", "does not run: SystemExit"),
        (f"{tmp_path}/none.py:score", "no file"),
        (f"{file}:other", "no function other"),
        (f"{broken}:score", "nothing_of_this_name"),
    ]:
        with pytest.raises(ValueError, match=word) as caught:
            load_function(name)
        assert "--reward_fn" in str(caught.value)


WORKER_FUNCTIONS = """
import os
import time


class Lengths:
    async def __call__(self, prompts, answers, *, ended, token_ids, conversations, **columns):
        assert conversations == prompts and len(columns["target"]) == len(prompts)
        print("printed by a worker")
        if "hang" in answers:
            time.sleep(60)
        if "die" in answers:
            os._exit(3)
        if "raise" in answers:
            raise KeyError("no such key")
        return [len(ids) + 0.25 * end for ids, end in zip(token_ids, ended)]


class Broken:
    def __init__(self, needed):
        pass


class Mute:
    pass
"""


@pytest.fixture(scope="module")
def lengths(tmp_path_factory):
    """Return the name of a class of rewards, and two workers that call it."""
    file = tmp_path_factory.mktemp("rewards") / "rewards.py"
    file.write_text(WORKER_FUNCTIONS)
    name = f"{file}:Lengths"
    pool = WorkerPool(name, num_workers=2, timeout_s=2)
    yield name, pool
    pool.close()


@pytest.mark.parametrize("with_pool", [False, True])
def test_an_async_class_is_a_reward_that_asks_for_tokens_and_ends(lengths, with_pool):
    name, pool = lengths
    reward = FunctionReward(load_function(name), name, pool=pool if with_pool else None)
    # "ab" and an EOS; "c" without one.
    assert weighted(reward)(make_answers()).tolist() == [3.25, 1.0]
    with pytest.raises(RewardFailure, match="KeyError.*no such key.*'one'.*'raise'"):
        weighted(reward)(make_answers(("raise", "c")))


def test_a_worker_that_hangs_or_ends_names_the_answer(lengths, caplog):
    name, pool = lengths
    with pytest.raises(RewardFailure, match="ended with exit code 3.*'two'.*'die'"):
        weighted(FunctionReward(load_function(name), name, pool=pool))(make_answers(("ab", "die")))
    rewards = weighted(FunctionReward(load_function(name), name, pool=pool, on_error="zero"))
    assert rewards(make_answers(("ab", "hang"))).tolist() == [3.25, 0.0]
    assert rewards.pop_metrics()["rewards_failed/Lengths"] == 0.5
    assert "TimeoutError: no scores after 2 s" in caplog.text and "'hang'" in caplog.text
    # The next answers have a worker again.
    assert rewards(make_answers()).tolist() == [3.25, 1.0]


def test_a_class_that_cannot_be_made_or_called_is_refused(lengths):
    file = lengths[0].removesuffix(":Lengths")
    with pytest.raises(ValueError, match="--reward_fn .*Broken without arguments fails.*needed"):
        load_function(f"{file}:Broken")
    with pytest.raises(ValueError, match="Mute has no method __call__"):
        load_function(f"{file}:Mute")


def test_a_tokenizer_may_extend_the_actors():
    actor, critic = byte_tokenizer(), byte_tokenizer()
    critic.add_special_tokens({"pad_token": "<|pad|>"})
    assert same_tokens(actor, critic) and not same_tokens(critic, actor)
    check_critic_tokenizer(actor, critic, "path")
    other = byte_tokenizer(pad_is_eos=True)
    with pytest.raises(ValueError, match="--critic_model_name_or_path path"):
        check_critic_tokenizer(actor, other, "path")


def test_the_guide_defines_the_metrics_of_rewards():
    guide = Path(__file__).resolve().parents[3] / "training/step3_rlhf_finetuning/README.md"
    reward = weighted(quiet, on_error="zero")
    reward(make_answers())
    for name in reward.pop_metrics():
        assert f"| {name.replace('quiet', 'NAME')} |" in guide.read_text(encoding="utf-8")
