"""Metrics, progress and tables."""

import json
import math
from pathlib import Path

import pytest

from dschat.tracking import progress, table
from dschat.tracking.metrics import MetricsWriter

ROOT = Path(__file__).resolve().parents[3]


def test_metrics_are_json_lines_with_null_for_nan_and_infinity(tmp_path):
    writer = MetricsWriter(tmp_path / "new")
    writer.write(0, {"eval/loss": 1.5})
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 0, "eval/loss": 1.5}'], (
        "a line is in the file as soon as it is written"
    )
    writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 2})
    writer.close()
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert (
        json.loads(lines[1]) == {"step": 1, "a": None, "b": None, "c": None, "d": 2}
        and len(lines) == 2
    )


def test_metrics_are_kept_while_the_disk_is_full(tmp_path, shown):
    writer = MetricsWriter(tmp_path)
    disk = writer._file
    with open("/dev/full", "wb", buffering=0) as writer._file:
        writer.write(1, {"a": 1.0})
        writer.write(2, {"a": 2.0})
        writer.sync()
    assert [("No space left on device" in line) for line in shown] == [True]
    writer._file = disk
    writer.write(3, {"a": 3.0})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_lost_metrics_are_counted_at_the_end(tmp_path, shown):
    writer = MetricsWriter(tmp_path)
    writer._file.close()
    writer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    for step in (1, 2):
        writer.write(step, {})
    writer.close()
    assert "lacks its last 2 lines" in shown[-1]


def test_a_run_continues_if_events_cannot_be_written(tmp_path, shown, monkeypatch):
    writer = MetricsWriter(tmp_path, tensorboard_dir=tmp_path / "events")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._tensorboard, "flush", full)
    writer.write(1, {"a": 1.0})
    writer.write(2, {"a": 2.0})
    writer.close()
    assert (
        len(shown) == 1 and "no more TensorBoard events" in shown[0] and "No space left" in shown[0]
    )
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_metrics_go_to_tensorboard_under_the_same_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(None, tensorboard_dir=tmp_path / "events")
    for step in (1, 2):
        writer.write(step, {"policy/loss": 0.5 * step})
    writer.close()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("policy/loss")] == [(1, 0.5), (2, 1.0)]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_other_ranks_write_no_metrics(tmp_path, as_rank_1):
    writer = MetricsWriter(tmp_path, tensorboard_dir=tmp_path / "events")
    writer.write(1, {"a": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_progress_shows_the_first_the_last_and_a_line_every_interval(shown, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "memory_text", lambda: "1.0/2.0 GiB")
    line = progress.Progress("SFT", 40, interval_s=5.0)
    for step in range(1, 41):
        now[0] += 1.0
        line.update(step, {"loss": f"{4 - step / 40:.3f}", "tok/s": "1,024"})
    steps = [int(text.split("step ")[1].split("/")[0]) for text in shown]
    assert steps == [1, 6, 11, 16, 21, 26, 31, 36, 40]
    assert shown[1] == "SFT  step 6/40  15%  loss 3.850  tok/s 1,024  mem 1.0/2.0 GiB  left 0:34"
    assert shown[-1].endswith("left 0:00")


def test_long_evaluations_show_a_line_every_interval_and_short_ones_none(shown, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "memory_text", lambda: "1.0/2.0 GiB")
    batches = progress.ReportedBatches("abcdefghij", "SFT  evaluation", interval_s=5.0)
    for seconds, numbers in ((0.4, []), (2.0, [3, 6, 9])):
        shown.clear()
        found = []
        for batch in batches:
            now[0] += seconds
            found.append(batch)
        assert found == list("abcdefghij") and len(batches) == 10
        assert [int(line.split("batch ")[1].split("/")[0]) for line in shown] == numbers
    assert shown[0] == "SFT  evaluation  batch 3/10  30%  mem 1.0/2.0 GiB  left 0:14"


def test_only_rank_0_shows_progress(shown, as_rank_1):
    progress.Progress("SFT", 1).update(1, {})
    assert len(list(progress.ReportedBatches("abc", "SFT", interval_s=0.0))) == 3
    assert shown == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (43.4, "0:43"), (59.6, "1:00"), (3599.9, "1:00:00"), (3723, "1:02:03")],
)
def test_clock(seconds, text):
    assert progress.clock(seconds) == text


def test_memory_of_this_process_is_part_of_the_hosts():
    used, total = progress.memory_gib()
    assert 0 < used < total


def test_table():
    rows = [["loss", "1.5", "10"], ["accuracy, held out", "0.25", "3"]]
    assert table.table(rows, header=["", "before", "after"]).splitlines() == [
        "                    before  after",
        "------------------  ------  -----",
        "loss                   1.5     10",
        "accuracy, held out    0.25      3",
    ]
