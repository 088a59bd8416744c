"""e2e_rlhf.py: which steps it resumes and which it starts over, by records and checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


class Chain:
    """e2e_rlhf.py with mains that only note their flags, and that can stop after a checkpoint."""

    def __init__(self, e2e, output: Path, monkeypatch):
        self.e2e = e2e
        self.output = output
        self.stopped: set[int] = set()  # steps that stop
        monkeypatch.setattr(e2e, "run_step", self._run)

    def _run(self, command, log, args, *, on_gpu):
        step = int(Path(command[0]).parent.name[4])
        self.ran.append((step, command[-2:] == ["--resume", "latest"]))
        if step in self.stopped:
            (log.parent / "checkpoints" / "step_00000005").mkdir(parents=True, exist_ok=True)
            raise KeyboardInterrupt

    def __call__(self, words: str = "", *, stop: int = 0) -> list[tuple[int, bool]]:
        """Run the pipeline; step `stop` writes a checkpoint and stops.

        Returns:
            The steps that ran, each with whether it was resumed.
        """
        self.ran: list[tuple[int, bool]] = []
        self.stopped = {stop}
        args = self.e2e.parse_args(f"--actor-model 1.3b --output-dir {self.output} {words}".split())
        try:
            self.e2e.run_steps(args, self.e2e.make_plan(args), on_gpu=False)
        except KeyboardInterrupt:
            assert stop
        return self.ran

    def folder(self, step: int) -> Path:
        """Return a step's output folder."""
        return next(self.output.glob(f"{'actor reward step3'.split()[step - 1]}-models/*"))

    def checkpoints(self) -> list[int]:
        """Return the steps that have checkpoints."""
        return [step for step in (1, 2, 3) if list(self.folder(step).glob("checkpoints/step_*"))]


@pytest.fixture
def chain(e2e, tmp_path, monkeypatch) -> Chain:
    return Chain(e2e, tmp_path / "out", monkeypatch)


FRESH, RESUMED = False, True


def test_a_stopped_step_is_resumed_and_finished_ones_do_not_run(chain):
    assert chain(stop=2) == [(1, FRESH), (2, FRESH)]
    assert chain(stop=3) == [(2, RESUMED), (3, FRESH)]
    assert chain() == [(3, RESUMED)]
    assert chain() == []
    assert chain("--fresh") == [(1, FRESH), (2, FRESH), (3, FRESH)] and chain.checkpoints() == []


@pytest.mark.parametrize("earlier", [1, 2])
def test_steps_after_one_that_ran_again_start_over(earlier, chain):
    chain(stop=3)
    assert chain(f"--step {earlier}") == [(earlier, FRESH)]
    assert not (chain.folder(3) / "started.json").exists()
    assert chain() == [(3, FRESH)]
    (chain.folder(3) / "finished.json").unlink()
    (chain.folder(3) / "checkpoints" / "step_00000005").mkdir(parents=True)
    assert chain(f"--step {earlier} 3") == [(earlier, FRESH), (3, FRESH)]


def test_checkpoints_of_later_steps_stay_until_a_step_has_finished(chain):
    chain(stop=3)
    chain("--step 1", stop=1)
    assert chain.checkpoints() == [1, 3]
    with pytest.raises(
        ValueError, match="step_00000005 belongs to a run that cannot be resumed.* --fresh"
    ):
        chain("--step 3")
    assert chain() == [(1, RESUMED), (3, FRESH)]


def test_flags_that_are_free_to_change_do_not_matter(chain, monkeypatch, tmp_path):
    chain("--save-interval 5", stop=3)
    moved = {
        step: Path("/elsewhere") / main.relative_to(ROOT) for step, main in chain.e2e.MAINS.items()
    }
    monkeypatch.setattr(chain.e2e, "MAINS", moved)
    assert chain("--save-interval 7", stop=3) == [(3, RESUMED)]
    assert chain() == [(3, RESUMED)]
    chain.output = chain.output.rename(tmp_path / "new name")
    args = chain.e2e.parse_args(["--actor-model", "1.3b", "--output-dir", str(chain.output)])
    chain.e2e.run_steps(args, chain.e2e.make_plan(args), on_gpu=False)
    assert chain.ran == [(3, RESUMED)], "the last run has nothing to do"


@pytest.mark.parametrize("stop", [1, 3])
def test_other_settings_delete_no_checkpoint_without_fresh(stop, chain):
    chain("--save-interval 5 --data-path a.jsonl b.jsonl", stop=stop)
    records = {file: file.read_text() for file in chain.output.rglob("*.json")}
    with pytest.raises(ValueError) as refused:
        chain("--save-interval 5 --data-path a.jsonl --actor-zero-stage 2")
    assert chain.ran == [] and list(chain.folder(stop).glob("checkpoints/step_*"))
    assert {file: file.read_text() for file in chain.output.rglob("*.json")} == records
    said = str(refused.value)
    assert str(chain.folder(stop) / "checkpoints" / "step_00000005") in said and "--fresh" in said
    assert "--data_path was a.jsonl b.jsonl and is a.jsonl; --zero_stage was 0 and is 2" in said
    assert "save_interval" not in said
    assert chain("--data-path a.jsonl --fresh") == [(1, FRESH), (2, FRESH), (3, FRESH)]


def test_without_checkpoints_other_settings_run_finished_steps_again(chain, capsys):
    chain()
    assert chain("--reward-zero-stage 2") == [(2, FRESH), (3, FRESH)]
    assert "starts over with other settings: --zero_stage was 0 and is 2" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["", "--fresh", "--step 1"])
def test_the_folder_of_another_running_run_is_not_touched(words, chain):
    chain(stop=3)
    (chain.folder(3) / "checkpoints" / "step_00000009").mkdir()
    files = sorted(chain.output.rglob("*.json"))
    code = "import sys; from pathlib import Path; from dschat.runtime.lock import lock_folder; "
    code += "lock_folder(Path(sys.argv[1])); print('locked', flush=True); input()"
    command = [sys.executable, "-c", code, str(chain.folder(3))]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "locked\n"
            with pytest.raises(
                ValueError,
                match=f"step3-models/1.3b: another run writes to it .process {holder.pid} ",
            ):
                chain(words)
        finally:
            holder.communicate("\n")
    assert chain.ran == [] and chain.checkpoints() == [3]
    assert sorted(chain.output.rglob("*.json")) == files
    assert json.loads((chain.folder(1) / "finished.json").read_text())
