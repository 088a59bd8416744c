"""scripts/reproduce_verifiable.py: task, flags, what is repeated, and numbers by hand."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.config.sft import SFTConfig
from scripts import _verifiable_report as report
from scripts import reproduce_verifiable as script
from scripts import verifiable_task as task


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("setting", [script.DEMO, script.TINY], ids=["demo", "tiny"])
def test_solutions_are_right_and_the_evaluation_is_new(setting, tmp_path):
    folder = task.write_data(tmp_path, num_train=2000, seed=1, **setting.task)
    train, held_out = rows_of(folder / "train.jsonl"), rows_of(folder / "eval.jsonl")
    assert len(held_out) == setting.task["num_eval"]
    unmarked = 0
    for row in train + held_out:
        *steps, result = row["response"].split(".")
        assert len(steps) == setting.task["with_steps"] * (1 + (row["kind"] == "word"))
        assert all(eval(step.replace("=", "==")) for step in steps)
        unmarked += "####" not in result
        assert int(result.split()[-1]) == row["result"] >= 0
        assert task.kind_of(row["prompt"]) == row["kind"]
    share = unmarked / len(train + held_out)
    assert share == pytest.approx(setting.task["unmarked_share"], abs=0.05)
    known, new = (
        {row["response"].rpartition(".")[0] or row["prompt"] for row in rows}
        for rows in (train, held_out)
    )
    assert not known & new
    assert len({row["prompt"] for row in held_out}) == len(held_out)
    assert {row["kind"] for row in held_out} >= {"sum"}


def test_data_is_the_same_each_time_and_an_exhausted_grammar_is_refused(tmp_path):
    texts = []
    for name in "ab":
        folder = task.write_data(tmp_path / name, num_train=50, seed=3, **script.DEMO.task)
        texts.append((folder / "train.jsonl").read_text())
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="only"):
        task.write_data(tmp_path, num_train=1, seed=1, **{**script.TINY.task, "largest": 1})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" 3 + 4 = 7. #### 7", 1.0),
        ("#### 7 ", 1.0),
        (" #### 8", 0.0),
        (" 7", 0.0),
        (" #### 7 nuts", 0.0),
        (" #### 6 #### 7", 0.0),
        (" #### 77", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_needs_the_format_and_the_result(answer, expected):
    assert task.reward(["?"], [answer], result=[7], kind=["sum"]) == [expected]


@pytest.mark.parametrize("setting", [script.DEMO, script.TINY], ids=["demo", "tiny"])
def test_every_run_has_valid_flags_and_as_many_answers(setting, tmp_path):
    for recipe in script.NAMES:
        flags = script.run_flags(recipe, setting, tmp_path / "sft", tmp_path / "data")
        config = parse_config(PPOConfig, flags)
        assert config.rollout_rows == setting.answers, recipe
        assert config.ppo.kl_coef > 0, recipe  # otherwise the table would lack the KL
        assert config.has_critic == (recipe == "ppo")
    words = ["--model_name_or_path", "m", "--data_path", "d", "--data_split", "1,0,0"]
    parse_config(SFTConfig, [*words, *setting.sft.split()])
    assert set(script.NAMES) == set(report.TITLES)


def write_run(folder: Path, *, right_after: str) -> None:
    """Write metrics and evaluations of three rollouts, with two sums and a word problem."""
    (folder / "evaluation").mkdir(parents=True)
    prompts = ["What is 1 + 1?", "How many nuts?", "What is 2 + 2?"]
    for rollout, right in ((0, "100"), (3, right_after)):
        rows = [
            json.dumps({"prompt": prompt, "score": float(digit)}) + "\n"
            for prompt, digit in zip(prompts, right, strict=True)
        ]
        (folder / "evaluation" / f"rollout_{rollout:06d}.jsonl").write_text("".join(rows))
    lines = [{"step": 0, "eval/score": 1 / 3, "eval/kl": 0.0, "eval/length": 9.0}]
    for step in (1, 2, 3):
        times = {"time/generate_s": 1.0, "time/score_s": 0.5, "time/train_s": 0.5 * step}
        lines.append({"step": step, "rollout/extra_rollouts": step - 1, **times})
    lines[-1] |= {"eval/score": right_after.count("1") / 3, "eval/kl": 2.0, "eval/length": 7.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_outcome_of_a_run(tmp_path):
    write_run(tmp_path, right_after="101")
    assert script.outcome(tmp_path) == {
        "curve": [
            dict(rollout=0, sampled_rollouts=0, seconds=0, accuracy=1 / 3, kl=0.0, length=9.0),
            dict(rollout=3, sampled_rollouts=6, seconds=7.5, accuracy=2 / 3, kl=2.0, length=7.0),
        ],
        "before": {"sum": "10", "word": "0"},
        "after": {"sum": "11", "word": "0"},
        "split": {"generate": 1.0, "score": 0.5, "train": 1.0},
    }


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Replace launches by ones that only write metrics; list the recipes and seeds of step 3."""
    found = []

    def run_step(main, flags, *, log):
        folder = Path(flags[flags.index("--output_dir") + 1])
        if main == script.STEP3:
            recipe = Path(flags[flags.index("--config") + 1]).stem
            found.append((recipe, flags[flags.index("--seed") + 1]))
            if recipe == "dapo":
                raise RuntimeError("dapo failed; see its log")
            write_run(folder, right_after="111")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            found.append("step 1")
        return 1.0

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    monkeypatch.setattr(script, "run_step", run_step)
    monkeypatch.setattr(script, "base_model", lambda args: model)
    monkeypatch.setattr(script, "draw", lambda lines, file: None)
    setting = script.Setting(**{**vars(script.TINY), "sft_rows": 2, "rows": 2})
    monkeypatch.setattr(script, "TINY", setting)
    return found


def run_script(monkeypatch, output: Path, *words: str) -> int:
    argv = ["reproduce_verifiable.py", "--tiny", "--output", str(output), *words]
    monkeypatch.setattr("sys.argv", argv)
    return script.main()


def test_only_missing_runs_are_launched(launched, tmp_path, monkeypatch):
    output = tmp_path / "results"
    words = ["--recipes", "ppo", "grpo", "--seeds"]
    run_script(monkeypatch, output, *words, "1")
    assert launched == ["step 1", ("ppo", "1"), ("grpo", "1")]
    launched.clear()
    run_script(monkeypatch, output, *words, "1", "2")  # step 1 is not repeated either
    assert launched == [("ppo", "2"), ("grpo", "2")]
    launched.clear()
    run_script(monkeypatch, output, *words, "1", "2")
    assert launched == []
    lines = rows_of(output / "results.jsonl")
    assert [(line["recipe"], line["seed"]) for line in lines] == [
        ("grpo", 1),
        ("grpo", 2),
        ("ppo", 1),
        ("ppo", 2),
    ]
    assert str(tmp_path) not in (output / "results.jsonl").read_text()
    # Another model: all runs and step 1 again.
    (tmp_path / "model" / "config.json").write_text('{"a": 1}')
    run_script(monkeypatch, output, *words, "1")
    assert launched == ["step 1", ("ppo", "1"), ("grpo", "1")]
    # The report needs neither the model nor step 1.
    launched.clear()
    shutil.rmtree(output / "work")
    assert run_script(monkeypatch, output, *words, "1", "--report_only") == 1
    assert launched == [] and not (output / "work").exists()


def test_a_failed_run_leaves_the_others_and_ends_with_1(launched, tmp_path, monkeypatch, capsys):
    words = ["--recipes", "dapo", "ppo"]
    assert run_script(monkeypatch, tmp_path / "out", *words) == 1
    assert [line["recipe"] for line in rows_of(tmp_path / "out" / "results.jsonl")] == ["ppo"]
    printed = capsys.readouterr().out
    assert "dapo failed; see its log" in printed and "1 runs are missing" in printed
    assert "| PPO | 33.3% | 100.0%" in (tmp_path / "out" / "table.md").read_text()


def test_no_run_begins_after_the_minutes(launched, tmp_path, monkeypatch, capsys):
    assert run_script(monkeypatch, tmp_path / "out", "--recipes", "ppo", "--minutes", "0") == 1
    assert launched == ["step 1"] and "1 runs are missing" in capsys.readouterr().out


def line(recipe: str, seed: int, before: str, after: str, *accuracies: float) -> dict:
    """Return a line of results.jsonl with an evaluation every 4 rollouts of 2 s each."""
    curve = [
        dict(
            rollout=4 * i, sampled_rollouts=4.0 * i, seconds=8.0 * i, accuracy=a, kl=1.0, length=5.0
        )
        for i, a in enumerate(accuracies)
    ]
    return {
        "recipe": recipe,
        "seed": seed,
        "before": {"sum": before},
        "after": {"sum": after},
        "curve": curve,
        "split": {"generate": 1.0, "score": 0.25, "train": 0.75},
        "hardware": {"cpu": "a CPU", "cpu_cores": 2},
        "versions": {"torch": "1", "transformers": "2", "deepspeed": "3"},
        "parallel": 2,
    }


def test_standard_errors_by_hand():
    # Over problems: means 1, 0.5, 0, 0.5, deviation sqrt(0.5/3), divided by 2.
    # Over seeds: means 0.75 and 0.25, deviation sqrt(0.125), divided by sqrt(2): 0.25.
    assert report.standard_error([[1, 1, 0, 1], [1, 0, 0, 0]]) == pytest.approx(0.25)
    assert report.standard_error([[1, 0, 0, 1]]) == pytest.approx((1 / 3) ** 0.5 / 2)
    # Equal means of the seeds: the problems decide.
    assert report.standard_error([[1, 0, 0, 0], [1, 0, 0, 0]]) == pytest.approx(0.25)


def test_the_table_by_hand():
    lines = [
        line("rloo", 1, "0000", "1111", 0.0, 0.5, 0.9),
        line("rloo", 2, "0000", "1110", 0.0, 0.85, 0.7),
        line("ppo", 1, "1000", "1001", 0.25, 0.5),
        line("ppo", 2, "1000", "0110", 0.25, 0.5),
    ]
    first = report.outcome_of("rloo", lines[:2])
    assert (first.before, first.after) == (0, 0.875)
    assert first.gain_error == pytest.approx(0.125) and first.meets_bar
    assert report.missed_bars(lines) == ["ppo"]
    found = report.report(lines).splitlines()
    assert found[0].count("|") == found[1].count("|") == found[2].count("|")
    assert found[2] == (
        "| RLOO | 0.0% | 87.5% ± 12.5 | 7.0 | 87.5% |  | 6 | 12 | 1.00 | 5.0 | 1.00 + 0.25 + 0.75 |"
    )
    assert found[3].startswith("| PPO | 25.0% | 50.0% ± 0.0 |") and "| not reached |" in found[3]
    assert "RLOO has the highest accuracy. All others are more than 2" in found[5]
    lines[1]["curve"] = lines[1]["curve"][:1]
    assert report.cost_of_goal(lines[:2], "sampled_rollouts") == "8 (1 of 2 seeds)"
    lines[2]["after"] = lines[3]["after"] = {"sum": "1101"}
    assert "Within 2 standard errors of it: PPO." in report.report(lines)


@pytest.mark.slow
def test_every_recipe_learns_the_tiny_task(tmp_path):
    words = ["--tiny", "--output", str(tmp_path), "--parallel", "2"]
    command = [sys.executable, str(script.ROOT / "scripts" / "reproduce_verifiable.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = rows_of(tmp_path / "results.jsonl")
    assert sorted(line["recipe"] for line in lines) == sorted(script.NAMES)
    assert all(title in (tmp_path / "table.md").read_text() for title in report.TITLES.values())
