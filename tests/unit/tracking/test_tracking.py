"""Metrics, progress and tables."""

import csv
import itertools
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from dschat.runtime import activity
from dschat.tracking import progress, table
from dschat.tracking.loggers import TensorBoardLogger, open_loggers
from dschat.tracking.metrics import MetricsWriter

ROOT = Path(__file__).resolve().parents[3]


def opened(names: list[str], folder: Path, *, resume_from: int | None = None) -> list:
    return open_loggers(
        names,
        output_dir=str(folder),
        events=str(folder / "events"),
        name="sft-step1",
        config={"seed": 1234, "data_path": ["x" * 900]},
        resume_from=resume_from,
    )


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


def test_metrics_go_to_tensorboard_under_the_same_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = TensorBoardLogger(tmp_path / "events", resume_from=None)
    writer = MetricsWriter(None, loggers=[events])
    for step in (1, 2):
        writer.write(step, {"policy/loss": 0.5 * step})
    writer.write_samples(2, [{"prompt": "p", "answer": "a"}])
    writer.close()
    found = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("policy/loss")] == [(1, 0.5), (2, 1.0)]
    assert found.Tags()["tensors"] == ["samples/text_summary"]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_other_ranks_write_no_metrics(tmp_path, as_rank_1):
    assert opened(["csv", "tensorboard"], tmp_path) == []
    writer = MetricsWriter(tmp_path)
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


def test_on_a_terminal_the_line_is_live_until_the_last(monkeypatch):
    now = [100.0]
    records = []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "has_terminal", lambda: True)
    monkeypatch.setattr(
        progress.logger, "info", lambda text, extra: records.append((text, bool(extra)))
    )
    line = progress.Progress("SFT", 4, interval_s=5.0)
    for step in range(1, 5):
        now[0] += 0.6
        line.update(step, {})
    steps = [(text.split("step ")[1].split("/")[0], live) for text, live in records]
    assert steps == [("1", True), ("2", True), ("3", True), ("4", False)]


def test_reported_work_prints_few_lines(shown, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "memory_text", lambda: "1.0/2.0 GiB")
    for seconds, expected in ((4, 0), (3600, 10)):
        shown.clear()
        with progress.reported_work("PPO  rollout 3", interval_s=5.0):
            with activity.part_of(batch=(2, 4)):
                for token in range(seconds):
                    activity.report(token=(token, 4000))
                    now[0] += 1.0
        assert len(shown) == expected
    activity.report(token=(1, 2))  # after the block
    assert [line.split("token ")[1].split("/")[0] for line in shown[:4]] == ["5", "10", "20", "40"]
    assert shown[0] == "PPO  rollout 3  batch 2/4  token 5/4000  mem 1.0/2.0 GiB  0:05 so far"


def test_reported_work_is_live_on_a_terminal_after_the_interval(monkeypatch):
    now = [100.0]
    records = []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "has_terminal", lambda: True)
    monkeypatch.setattr(
        progress.logger, "info", lambda text, extra: records.append((text, bool(extra)))
    )
    with progress.reported_work("PPO  rollout 3", interval_s=5.0):
        for token in range(25):
            activity.report(token=(token, 25))
            now[0] += 0.25
    found = [(text.split("token ")[1].split("/")[0], live) for text, live in records]
    assert found == [("20", True), ("22", True), ("24", True)]


def test_only_rank_0_shows_progress(shown, as_rank_1, monkeypatch):
    monkeypatch.setattr(progress.time, "monotonic", itertools.count(0, 100).__next__)
    with progress.reported_work("PPO", interval_s=0.0):
        activity.report(token=(1, 2))
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


def csv_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_row_a_step_and_a_column_a_metric(tmp_path):
    writer = MetricsWriter(tmp_path, loggers=opened(["csv"], tmp_path))
    writer.write(0, {"eval/loss": 0.1})
    writer.write(1, {"train/loss": 2.0, 'odd, "name"': math.nan})
    writer.write(2, {"eval/loss": 0.05, "train/loss": 1.0})
    writer.write_samples(2, [{"prompt": "p"}])
    writer.close()
    odd = 'odd, "name"'
    rows = [
        {"step": "0", "eval/loss": "0.1", "train/loss": "", odd: ""},
        {"step": "1", "eval/loss": "", "train/loss": "2.0", odd: ""},
        {"step": "2", "eval/loss": "0.05", "train/loss": "1.0", odd: ""},
    ]
    assert csv_rows(tmp_path / "metrics.csv") == rows
    # A resumed run replaces the rows after its checkpoint.
    writer = MetricsWriter(
        tmp_path, loggers=opened(["csv"], tmp_path, resume_from=1), resume_from=1
    )
    writer.write(2, {"train/loss": 7.0})
    writer.close()
    rows[2] |= {"eval/loss": "", "train/loss": "7.0"}
    assert csv_rows(tmp_path / "metrics.csv") == rows
    opened(["csv"], tmp_path)  # a new run starts over
    assert csv_rows(tmp_path / "metrics.csv") == []


class StandIn(ModuleType):
    """A module that notes the calls of its functions, and those of the run that they return."""

    def __init__(self, name: str):
        super().__init__(name)
        self.calls: list[tuple[str, tuple, dict]] = []
        self.info = SimpleNamespace(run_id="given-id")

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call

    def named(self, name: str) -> list[tuple[tuple, dict]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def stand_ins(monkeypatch) -> dict[str, StandIn]:
    found = {name: StandIn(name) for name in ("wandb", "trackio", "mlflow")}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_every_logger_gets_the_same_names_and_a_resumed_run_continues(tmp_path, stand_ins):
    names = ["wandb", "trackio", "mlflow"]
    wandb, trackio, mlflow = (stand_ins[name] for name in names)
    for done in (None, 3):
        writer = MetricsWriter(None, loggers=opened(names, tmp_path, resume_from=done))
        writer.write(4, {"train/loss": 2.0})
        writer.write_samples(4, [{"prompt": "p", "answer": "a"}])
        writer.close()
    assert wandb.named("log")[0][0] == ({"step": 4, "train/loss": 2.0},)
    assert trackio.named("log")[0] == (({"train/loss": 2.0},), {"step": 4})
    assert mlflow.named("log_metrics")[0] == (({"train/loss": 2.0},), {"step": 4})
    assert wandb.named("Table")[0][1] == {"columns": ["prompt", "answer"], "data": [["p", "a"]]}
    assert mlflow.named("log_dict")[0][0][1] == "samples/step_000004.json"
    for module, last in ((wandb, "finish"), (trackio, "finish"), (mlflow, "end_run")):
        assert len(module.named(last)) == 2
    ids = json.loads((tmp_path / "loggers.json").read_text())
    started = [kwargs for _, kwargs in wandb.named("init")]
    assert [call["id"] for call in started] == [ids["wandb"]] * 2
    assert {call["resume"] for call in started} == {"allow"}
    started = [kwargs for _, kwargs in trackio.named("init")]
    assert [call["name"] for call in started] == [ids["trackio"]] * 2
    assert [kw["run_id"] for _, kw in mlflow.named("start_run")] == [None, "given-id"]
    assert len(mlflow.named("log_params")) == 1
    assert len(mlflow.named("log_params")[0][0][0]["data_path"]) == 500
    # A new run in the folder is a new run in the loggers.
    opened(names, tmp_path)
    assert wandb.named("init")[-1][1]["id"] != ids["wandb"]


def test_a_logger_that_fails_costs_no_run_and_no_other_logger(tmp_path, stand_ins, shown):
    def fail(*args, **kwargs):
        raise ConnectionError("no route to host")

    stand_ins["wandb"].log = fail
    writer = MetricsWriter(tmp_path, loggers=opened(["wandb", "csv"], tmp_path))
    for step in (1, 2):
        writer.write(step, {"a": 1.0})
    writer.close()
    assert len(shown) == 1 and "Wandb gets no more metrics" in shown[0]
    assert "no route to host" in shown[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(csv_rows(tmp_path / "metrics.csv")) == 2


def test_a_logger_that_cannot_start_is_an_error_with_the_flag(tmp_path, stand_ins):
    def fail(*args, **kwargs):
        raise RuntimeError("no API key")

    stand_ins["wandb"].init = fail
    with pytest.raises(ValueError, match=r"--report_to wandb: .*no API key.*WANDB_MODE=offline"):
        opened(["wandb"], tmp_path)
