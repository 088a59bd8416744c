"""The summary of a pipeline, from files written by hand."""

import json

import pytest

from dschat.pipeline.summary import (
    paired_lower_bound,
    ppo_section,
    shortfalls,
    summary_text,
    supervised_section,
)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_supervised_section_reads_the_first_and_the_last_evaluation(tmp_path):
    write_rows(
        tmp_path / "metrics.jsonl",
        [
            {"step": 0, "eval/accuracy": 0.5},
            {"step": 1, "train/loss": 1.0},
            {"step": 2, "eval/accuracy": 0.9},
        ],
    )
    assert supervised_section(tmp_path, "eval/accuracy", "accuracy") == {
        "accuracy_before": 0.5,
        "accuracy_after": 0.9,
    }


def test_lower_bound_of_a_constant_gain_is_that_gain_and_of_noise_is_below_zero():
    assert paired_lower_bound([1.0, 5.0, 9.0], [3.0, 7.0, 11.0]) == 2.0
    assert paired_lower_bound([0.0] * 4, [1.0, -1.0, 1.0, -1.0]) < 0
    # Normal approximation: 0.5 -+ 1.96 * 0.5 / sqrt(400) for gains of 0 and 1
    assert paired_lower_bound([0.0] * 400, [0.0, 1.0] * 200) == pytest.approx(0.451, abs=0.006)


def test_ppo_section_by_hand(tmp_path):
    def rows(scores, answers):
        return [
            {
                "prompt": "Review: It is",
                "answer": a,
                "score": s,
                "kl": 2.0,
                "length": len(a),
                "ended": s > 0,
            }
            for s, a in zip(scores, answers, strict=True)
        ]

    write_rows(tmp_path / "evaluation" / "rollout_000000.jsonl", rows([-1.0, 1.0], [" bad", " so"]))
    write_rows(tmp_path / "evaluation" / "rollout_000004.jsonl", rows([2.0, 2.0], [" ok", " fine"]))
    section = ppo_section(tmp_path, judge=lambda text: float(text == "It is fine"))
    assert section["score_before"] == 0.0 and section["score_after"] == 2.0 and section["kl"] == 2.0
    assert section["score_sd_before"] == pytest.approx(2**0.5)
    assert section["score_gain_sd"] == pytest.approx(2**0.5)
    assert (section["length_before"], section["length_after"]) == (3.5, 4.0)
    assert (section["eos_rate_before"], section["eos_rate_after"]) == (0.5, 1.0)
    assert (section["judge_before"], section["judge_after"]) == (0.0, 0.5)
    assert section["score_gain_lower95"] == 1.0  # gains 3 and 1: the lowest resample is (1, 1)
    text = summary_text(
        {
            "sft": {"perplexity_before": 9.0, "perplexity_after": 4.5},
            "reward": {"accuracy_before": 0.5, "accuracy_after": 0.875},
            "ppo": section,
            "samples": [{"prompt": "It is", "base": " x", "sft": " y", "rlhf": " fine"}],
            "seconds": {"sft": 1.4, "total": 3.0},
        }
    )
    for words in ("9.0", "4.5", "87.5%", "+1.41", "RLHF 'fine'", "total 3"):
        assert words in text
    assert "PPO raised" not in text


@pytest.mark.parametrize(
    "changed, told",
    [
        ({}, []),
        ({"perplexity_after": 9.0}, ["SFT did not lower the perplexity"]),
        ({"accuracy_after": 0.4}, ["The reward model did not become more accurate"]),
        ({"score_after": -1.0, "score_gain_lower95": -2.0}, ["PPO did not raise the score"]),
        ({"score_gain_lower95": -0.25}, ["noise of 32 held-out prompts (95% interval", "-0.25)"]),
    ],
    ids=str,
)
def test_what_is_no_better_is_said_with_a_reason(changed, told):
    ppo = {"prompts": 32, "score_before": 0.0, "score_after": 1.0, "score_gain_lower95": 0.5}
    lines = shortfalls(
        {"perplexity_before": 9.0, "perplexity_after": 4.5} | changed,
        {"accuracy_before": 0.5, "accuracy_after": 0.9} | changed,
        ppo | changed,
    )
    assert len(lines) == (2 if told else 0)
    text = " ".join("\n".join(lines).split())
    assert [word for word in told if word not in text] == []
