"""scripts/reproduce_ppo.py with a launcher that only writes metrics: reruns and verdicts."""

import json
from types import SimpleNamespace

import pytest

from scripts import reproduce_ppo

KINDS = ("epochs1", "epochs4")


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Prepare two models and two kinds of runs.

    `main` runs the script, `launched` lists its commands, and `gain` is the score gain of each run.
    """
    for name in ("actor", "critic"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "config.json").write_text("{}")
        (tmp_path / name / "model" / "model.safetensors").write_bytes(name.encode())
    found = SimpleNamespace(
        launched=[], gain=2.0, more=[], output=tmp_path / "results", models=tmp_path
    )

    def runs(work):
        models = [
            f"--{name}_model_name_or_path {tmp_path / name / 'model'}"
            for name in ("actor", "critic")
        ]
        return {
            name: [*" ".join(models).split(), "--reward_fn", "f.py:f", "--kind", name, *found.more]
            for name in KINDS
        }

    def run(command, **_):
        found.launched.append(command)
        write_run(
            command[command.index("--output_dir") + 1], gain=found.gain, fast="epochs4" in command
        )
        return SimpleNamespace(returncode=0)

    def main(*words: str) -> int:
        found.launched.clear()
        monkeypatch.setattr(
            "sys.argv", ["reproduce_ppo.py", "--tiny", "--output", str(found.output), *words]
        )
        with pytest.raises(SystemExit) as caught:
            reproduce_ppo.main()
        return caught.value.code

    found.main = main
    monkeypatch.setattr(reproduce_ppo, "tiny_runs", runs)
    monkeypatch.setattr(reproduce_ppo, "draw", lambda *_: None)
    monkeypatch.setattr(reproduce_ppo.subprocess, "run", run)
    return found


def write_run(folder: str, *, gain: float, fast: bool) -> None:
    """Write metrics and evaluations of four rollouts; a fast run gains all in the first two."""
    evaluations = reproduce_ppo.Path(folder) / "evaluation"
    evaluations.mkdir(parents=True)
    steps = {0: 0.0, 2: gain if fast else 0.5 * gain, 4: gain}
    lines = []
    for step in range(5):
        line = {"step": step, "value/explained_variance": 0.1 * step + 0.2} if step else {"step": 0}
        if step in steps:
            line |= {"eval/score": steps[step], "eval/score_sd": 1.0}
            row = {"prompt": "a", "answer": "b", "kl": 3.0, "length": 2, "ended": True}
            rows = [{**row, "score": steps[step] + offset} for offset in (-(0.5**0.5), 0.5**0.5)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (evaluations / f"rollout_{step:06d}.jsonl").write_text(text)
        lines.append(json.dumps(line) + "\n")
    (evaluations.parent / "metrics.jsonl").write_text("".join(lines))


def summary(script) -> dict:
    return json.loads((script.output / "summary.json").read_text())


def record(script) -> dict:
    return json.loads((script.output / "epochs1_seed1.json").read_text())


def test_bars_that_are_met_end_with_0_and_a_summary_of_the_command(script):
    assert script.main("--seeds", "1", "2") == 0
    assert len(script.launched) == 4
    found = summary(script)
    assert found["all_met"] and {met for _, _, met in found["bars"]} == {"yes"}
    assert found["command"] == "python scripts/reproduce_ppo.py --tiny --output results --seeds 1 2"
    assert script.main(f"--models={script.models}", "--seeds", "1") == 0
    assert summary(script)["command"].endswith(f" --models={script.models.name} --seeds 1")


def test_a_missed_bar_is_named_and_ends_with_1(script):
    script.gain = 0.9
    assert script.main("--seeds", "1") == 1
    found = summary(script)
    missed = [text for text, _, met in found["bars"] if met == "NO"]
    assert not found["all_met"] and missed == [f"{name}, seed 1: score gain, sd" for name in KINDS]


def test_a_record_is_judged_by_every_bar(script):
    assert script.main("--seeds", "1") == 0
    path = script.output / "epochs4_seed1.json"
    good = record(script)
    for key, bad in (
        ("kl", 8.1),
        ("explained_variance_last5", 0.3),
        ("score_gain_sd", 0.99),
        ("judge_gain_lower95", 0.0),
    ):
        path.write_text(json.dumps({**good, "result": {**good["result"], key: bad}}))
        rows, all_met = reproduce_ppo.judge_bars(script.output, list(KINDS), [1])
        assert not all_met and [met for _, _, met in rows].count("NO") == 1, key


def test_slow_learning_with_four_epochs_is_a_missed_bar(script):
    assert script.main("--seeds", "1") == 0
    slow = (script.output / "epochs1_seed1.jsonl").read_text()
    (script.output / "epochs4_seed1.jsonl").write_text(slow)
    rows, all_met = reproduce_ppo.judge_bars(script.output, list(KINDS), [1])
    assert not all_met and rows[-1][1:] == ["4", "NO"]


def test_only_runs_with_other_flags_or_models_are_repeated(script):
    script.main("--seeds", "1")
    assert len(script.launched) == 2
    script.main("--seeds", "1")
    assert script.launched == []
    script.main("--seeds", "1", "2")
    assert [command[command.index("--seed") + 1] for command in script.launched] == ["2", "2"]
    script.more = ["--kl_coef", "0.5"]
    script.main("--seeds", "1")
    assert len(script.launched) == 2 and "0.5" in script.launched[0]
    # The folder names are the same; only the files differ.
    for name, file in (("actor", "model.safetensors"), ("critic", "config.json")):
        (script.models / name / "model" / file).write_text("other")
        script.main("--seeds", "1")
        assert len(script.launched) == 2, name
        script.main("--seeds", "1")
        assert script.launched == [], name


def test_records_without_fingerprints_are_still_read(script):
    script.main("--seeds", "1")
    known = record(script)
    assert set(known.pop("models")) == {"--actor_model_name_or_path", "--critic_model_name_or_path"}
    assert str(script.models) not in json.dumps(known)
    (script.output / "epochs1_seed1.json").write_text(json.dumps(known))
    script.main("--seeds", "1")
    assert script.launched == []
    script.more = ["--kl_coef", "0.5"]
    script.main("--seeds", "1")
    assert len(script.launched) == 2


def test_the_published_records_are_read_and_their_bars_met():
    output = reproduce_ppo.ROOT / "docs" / "results" / "ppo"
    rows, all_met = reproduce_ppo.judge_bars(
        output, ["epochs1", "epochs4", "control", "addition"], [1, 2, 3, 4]
    )
    assert all_met and rows == json.loads((output / "summary.json").read_text())["bars"]
