"""Output folders: one run each, and repaired after a kill while the model was being replaced."""

import itertools
import stat
from pathlib import Path

import pytest

from dschat.config.ppo_options import MODEL_FOLDERS
from dschat.models import export
from dschat.models.export import repair_folder, replace_folder
from dschat.trainers.output_folder import prepare_output_dir

SFT = (
    "--model_name_or_path {stock}/base/llama --data_path {stock}/toy --data_split 1,0,0 "
    "--dtype fp32 --max_seq_len 48 "
    "--per_device_train_batch_size 4"
)


class Killed(BaseException):
    """A stand-in for a kill: no error handling of Python runs."""


def folder(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("_", ".", 1)).write_text(text)
    return path


def content(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


@pytest.mark.parametrize("killed_at", range(1, 6))
def test_a_killed_replacement_is_repaired(killed_at, tmp_path, monkeypatch):
    old = folder(tmp_path / "out", config_json="old", metrics_jsonl="lines", log_txt="log")
    new = folder(tmp_path / ".out.abcd1234.tmp", config_json="new")
    calls = itertools.count(1)
    rename = Path.rename

    def renaming(self, target):
        if next(calls) == killed_at:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renaming)
    monkeypatch.setattr(
        export.shutil, "rmtree", lambda *args, **kwargs: (_ for _ in ()).throw(Killed)
    )
    with pytest.raises(Killed):
        replace_folder(new, old)
    monkeypatch.undo()
    repair_folder(old)
    assert content(old) == {
        "config.json": "old" if killed_at <= 2 else "new",
        "metrics.jsonl": "lines",
        "log.txt": "log",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_repairing_leaves_files_of_others(tmp_path):
    out = folder(tmp_path / "out", config_json="mine")
    others = [
        folder(tmp_path / name)
        for name in (".out.x.abcd1234.tmp", ".outer.abcd1234.tmp", ".out.abcd.tmp")
    ]
    repair_folder(out)
    assert all(path.exists() for path in others) and content(out) == {"config.json": "mine"}


def test_the_second_run_in_a_folder_refuses(zygote, tmp_path):
    out = tmp_path / "out"
    argv = f"{SFT} --max_train_steps 2000"
    first = zygote.start(1, out, argv)
    first.wait_for_step(3)
    second = zygote.run(1, out, argv, log=tmp_path / "second.log")
    first.wait_for_step((out / "metrics.jsonl").read_text().count("\n"))  # it continues
    first.kill()
    zygote.wait(first)
    assert second.statuses == [1]
    assert (
        f"--output_dir {out}: another run writes to it (process {first.pids[0]} on " in second.log
    )
    third = zygote.run(1, out, argv.replace("2000", "1"))
    assert third.statuses == [0], "a run that was killed holds nothing"


def test_a_folder_that_cannot_be_written_is_refused(zygote, tmp_path):
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(stat.S_IRUSR | stat.S_IXUSR)
    run = zygote.run(1, tmp_path / "closed" / "out", SFT, log=tmp_path / "log", plain_user=True)
    assert run.statuses == [1]
    assert (
        f"--output_dir {tmp_path}/closed/out: not writable (Permission denied). Give another folder"
        in run.log
    )
    (tmp_path / "only-read").mkdir()
    (tmp_path / "only-read").chmod(stat.S_IRUSR | stat.S_IXUSR)
    tmp_path.chmod(0o777)
    run = zygote.run(1, tmp_path / "only-read", SFT, log=tmp_path / "second.log", plain_user=True)
    assert (
        run.statuses == [1]
        and f"--output_dir {tmp_path}/only-read: " in run.log
        and "Permission denied" in run.log
    )


@pytest.mark.parametrize(
    "place, below, held",
    [
        ("out", (), ["config.json", "model.safetensors", "tokenizer.json"]),
        ("out", (), ["pytorch_model.bin"]),
        ("out", MODEL_FOLDERS, ["model-00001-of-00002.safetensors"]),
        ("out/actor", MODEL_FOLDERS, ["config.json"]),
        (
            "out/critic",
            MODEL_FOLDERS,
            ["vocab.json", "merges.txt", "config.json", "generation_config.json"],
        ),
    ],
)
def test_a_model_not_written_by_a_run_is_kept(place, below, held, tmp_path):
    (tmp_path / place).mkdir(parents=True)
    for name in held:
        (tmp_path / place / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        ValueError, match="--output_dir .*/out: .* holds a model that no training run wrote"
    ) as refused:
        prepare_output_dir(str(tmp_path / "out"), step="Step", below=below)
    assert (
        f"{tmp_path / place} holds a model that no training run wrote "
        f"({', '.join(sorted(held)[:3])}" in str(refused.value)
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_with_earlier_runs_or_other_files_are_accepted(tmp_path):
    ours = folder(tmp_path / "ours", config_json="{}", run_json="{}")
    other = folder(tmp_path / "other", notes_txt="of the user", training_log="lines")
    (other / "actor").mkdir()
    # A step that saves to the folder itself ignores models below it.
    (other / "actor" / "config.json").write_text("{}")
    # Killed while the model was being replaced: the record is still in the old folder.
    killed = folder(tmp_path / "killed", config_json="{}")
    folder(tmp_path / ".killed.abcd1234.old")
    folder(tmp_path / ".killed.abcd1234.old" / "killed", config_json="{}", run_json="{}")
    for path in (ours, other, killed, tmp_path / "new"):
        prepare_output_dir(str(path), step="Step")
    assert (killed / "run.json").exists() and (other / "notes.txt").exists()


def test_the_model_of_another_step_is_kept(tmp_path):
    record = '{"step": "Step 1, supervised fine-tuning"}'
    out = folder(tmp_path / "out", config_json="{}", run_json=record)
    with pytest.raises(
        ValueError,
        match=f"--output_dir {out}: it holds the model of .Step 1, supervised fine-tuning., and",
    ):
        prepare_output_dir(str(out), step="Step 2, reward model")
    prepare_output_dir(str(out), step="Step 1, supervised fine-tuning")
    with pytest.raises(ValueError, match="a run of .Step 3, PPO. would replace it or its run.json"):
        # Step 3 saves to folders in it.
        prepare_output_dir(str(out), step="Step 3, PPO", below=MODEL_FOLDERS)
    for text in ("{", "[]", "7"):
        (out / "run.json").write_text(text)
        with pytest.raises(ValueError, match="its run.json is damaged"):
            prepare_output_dir(str(out), step="Step 1, supervised fine-tuning")
    # A run that was stopped before it saved a model does not block others.
    prepare_output_dir(
        str(folder(tmp_path / "stopped", run_json=record)), step="Step 2, reward model"
    )


def test_the_working_directory_is_refused_as_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for name in (".", str(tmp_path)):
        with pytest.raises(
            ValueError, match="--output_dir .*: this is the current folder.*Give a folder below it"
        ):
            prepare_output_dir(name, step="Step")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
