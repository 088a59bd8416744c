"""Alarms of step 3 on planted series, and none on healthy ones."""

import json
import logging
from pathlib import Path

import pytest

from dschat.tracking.alarms import ALARMS, AlarmLog, Alarms

RESULTS = Path(__file__).resolve().parents[3] / "docs" / "results" / "ppo"
HEALTHY = {
    "objective/score": (0.0, 2.0),
    "objective/score_std": (1.0, 1.0),
    "objective/kl": (0.0, 8.0),
    "objective/entropy": (2.0, 1.2),
    "response/length_mean": (100.0, 140.0),
    "response/eos_rate": (0.95, 0.9),
    "response/repetition": (0.02, 0.05),
    "judges/taste": (0.5, 0.4),
    "judges_std/taste": (1.0, 1.0),
    "rollout/equal_groups": (0.1, 0.5),
}
ROLLOUTS = 20


def series(**changed: tuple[float, float]) -> list[dict[str, float]]:
    """Return metrics that go from the first to the second value of each range, in a line.

    Args:
        changed: ranges other than the healthy ones, by the part of the name after the slash, or
            "judge".
    """
    ranges = {name: changed.get(name.split("/")[1], span) for name, span in HEALTHY.items()}
    ranges["judges/taste"] = changed.get("judge", HEALTHY["judges/taste"])
    return [
        {name: start + (end - start) * i / (ROLLOUTS - 1) for name, (start, end) in ranges.items()}
        for i in range(ROLLOUTS)
    ]


def raised(rows: list[dict[str, float]]) -> list[str]:
    """Return the names of all alarms, in the order in which they come."""
    alarms = Alarms()
    found = [alarm for number, row in enumerate(rows, 1) for alarm in alarms.update(number, row)]
    assert found == alarms.raised
    return [alarm.name for alarm in found]


def test_a_healthy_series_is_silent():
    assert raised(series()) == []


@pytest.mark.parametrize("name", ["addition_seed1", "epochs1_seed1", "epochs4_seed3"])
def test_measured_runs_are_silent(name):
    lines = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert sum("objective/score" in row for row in rows) > 20
    assert raised(rows) == []


PLANTED = {
    "longer answers": ("length", {"length_mean": (100.0, 320.0)}, "tokens"),
    "shorter answers": ("length", {"length_mean": (100.0, 20.0)}, "tokens"),
    "truncated answers": ("truncated", {"eos_rate": (0.95, 0.4)}, "--missing_eos_penalty"),
    "KL": ("kl", {"kl": (0.0, 60.0)}, "--kl_coef"),
    "repetition": ("repetition", {"repetition": (0.02, 0.4)}, "4-grams"),
    "judge": ("judge", {"judge": (0.5, -0.5)}, "judge taste"),
    "entropy": ("entropy", {"entropy": (2.0, 0.05)}, "--entropy_coef"),
    "equal groups": ("equal_groups", {"equal_groups": (0.5, 1.0)}, "groups"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_series_raises_its_alarm_once(case):
    name, changed, words = PLANTED[case]
    rows = series(**changed)
    rows += rows[-1:] * 5  # for as long as it takes a mean to follow; the alarm is not repeated
    assert raised(rows) == [name]
    alarms = Alarms()
    for number, row in enumerate(rows, 1):
        alarms.update(number, row)
    assert words in alarms.raised[0].message
    assert alarms.raised[0].rollout > 5


@pytest.mark.parametrize(
    "case",
    ["longer answers", "shorter answers", "truncated answers", "KL", "repetition", "judge"],
)
def test_a_band_that_is_left_without_a_rising_score_is_silent(case):
    _, changed, _ = PLANTED[case]
    assert raised(series(**changed, score=(0.0, 0.0))) == []


def test_long_answers_may_have_a_larger_kl():
    rows = series(kl=(0.0, 60.0), length_mean=(1000.0, 1000.0))
    assert raised(rows) == []


def with_evaluations(rows: list[dict], scores: list[float]) -> list[dict]:
    """Return the rows with an evaluation before them and every five rollouts."""
    found = [{"eval/score": scores[0], "eval/score_sd": 1.0}, *(dict(row) for row in rows)]
    for i, score in enumerate(scores[1:], 1):
        found[5 * i] |= {"eval/score": score, "eval/score_sd": 1.0}
    return found


def test_an_evaluation_that_falls_while_the_training_score_rises():
    assert raised(with_evaluations(series(), [0.0, 0.8, 0.4, 0.3, 0.2])) == ["evaluation"]
    # From the start on.
    assert raised(with_evaluations(series(), [0.0, -0.5, -0.6, -0.6, -0.7])) == ["evaluation"]


@pytest.mark.parametrize(
    "scores", [[0.0, 0.5, 1.0, 1.5, 2.0], [0.0, 0.8, 0.8, 0.2, 0.8], [0.0, 0.8, 0.7, 0.6, 0.6]]
)
def test_an_evaluation_that_rises_or_wavers_is_silent(scores):
    assert raised(with_evaluations(series(), scores)) == []


def test_an_evaluation_that_falls_with_the_training_score_is_silent():
    rows = with_evaluations(series(score=(2.0, 0.0)), [2.0, 1.5, 1.0, 0.5, 0.0])
    assert raised(rows) == []


def test_missing_and_infinite_values_do_not_count():
    rows = series(**PLANTED["KL"][1])
    for row in rows[5:15:2]:
        row["objective/kl"] = None
    rows[16] |= {"objective/entropy": float("nan"), "response/length_mean": float("inf")}
    assert raised(rows + rows[-1:] * 5) == ["kl"]
    for row in rows:
        del row["objective/kl"]
    assert raised(rows) == []


def write_metrics(folder: Path, rows: list[dict]) -> None:
    lines = [json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(rows, 1)]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


def kept(folder: Path) -> list[dict]:
    return json.loads((folder / ALARMS).read_text(encoding="utf-8"))


@pytest.mark.parametrize("stop", [3, 12, 19])
def test_a_resumed_run_has_the_alarms_of_an_uninterrupted_one(tmp_path, caplog, stop):
    rows = series(kl=(0.0, 60.0), entropy=(2.0, 0.05))
    rows += rows[-1:] * 5
    log = AlarmLog(tmp_path, last=0)
    for number, row in enumerate(rows, 1):
        log.update(number, row)
    whole = kept(tmp_path)
    assert sorted(row["name"] for row in whole) == ["entropy", "kl"]

    # The file of metrics has one line that belongs to no checkpoint.
    write_metrics(tmp_path, rows[: stop + 1])
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="dschat"):
        log = AlarmLog(tmp_path, last=stop)
        before = kept(tmp_path) if (tmp_path / ALARMS).exists() else []
        for number, row in enumerate(rows[stop:], stop + 1):
            log.update(number, row)
    assert kept(tmp_path) == whole
    assert before == [row for row in whole if row["rollout"] <= stop]
    # Each alarm is said once, by the run in which it was raised.
    assert len(caplog.records) == len(whole) - len(before)


def test_a_new_run_deletes_the_alarms_of_an_earlier_one(tmp_path):
    (tmp_path / ALARMS).write_text("[]")
    write_metrics(tmp_path, [])
    AlarmLog(tmp_path, last=0)
    assert not (tmp_path / ALARMS).exists()


def test_a_run_without_folder_logs_alarms(caplog):
    log = AlarmLog(None, last=0)
    rows = series(**PLANTED["equal groups"][1])
    with caplog.at_level(logging.WARNING, logger="dschat"):
        for number, row in enumerate(rows + rows[-1:] * 5, 1):
            log.update(number, row)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "all answers score the same" in caplog.text


def test_other_ranks_say_and_write_no_alarm(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("dschat.runtime.dist.is_main", lambda: False)
    (tmp_path / ALARMS).write_text("[]")  # rank 0's
    log = AlarmLog(tmp_path, last=0)
    rows = series(**PLANTED["KL"][1])
    for number, row in enumerate(rows + rows[-1:] * 5, 1):
        log.update(number, row)
    assert caplog.records == []
    assert kept(tmp_path) == []
