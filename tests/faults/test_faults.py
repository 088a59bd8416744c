"""Faults that a run survives or reports: kills, a full disk, dead ranks, damaged files."""

import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from dschat.checkpoint.run_checkpoint import newest_checkpoint, open_checkpoint

HOOKS = Path(__file__).with_name("hooks.py")
SFT = (
    "--model_name_or_path {stock}/base/opt --dropout 0.1 --data_path {stock}/toy "
    "--data_split 1,0,0 --dtype fp32 "
    "--max_seq_len 48 --per_device_train_batch_size 4 --learning_rate 1e-2 --zero_stage 2 "
    "--per_device_eval_batch_size 16"
)
PAIRS = SFT.replace("1,0,0", "0,1,0")
PPO = (
    "--actor_model_name_or_path {stock}/sft/llama --critic_model_name_or_path {stock}/reward/llama "
    "--data_path {stock}/toy --data_split 0,0,1 --max_prompt_seq_len 24 --max_answer_seq_len 6 "
    "--max_train_steps 6 "
    "--per_device_generation_batch_size 4 --per_device_training_batch_size 4 --dtype fp32 "
    "--eval_prompts 4"
)
KILLS = 20


def hook(name: str) -> dict:
    return {"before": f"{HOOKS}:{name}"}


def steps_of(run) -> list[int]:
    return [line["step"] for line in run.metrics()]


def test_twenty_kills_at_random_moments_lose_only_updates_after_the_last_checkpoint(
    zygote, tmp_path, record
):
    draw = random.Random(3)
    steps = 240
    every = 3
    argv = f"{SFT} --max_train_steps {steps} --save_interval {every}"
    whole = zygote.run(1, tmp_path / "whole", argv)
    assert whole.statuses == [0], whole.log[-3000:]
    out = tmp_path / "killed"
    reached = 0
    lost = []
    in_save = 0
    for number in range(KILLS):
        saves = draw.randrange(1, 3) if number % 2 else 0  # every other kill is in a save
        run = zygote.start(1, out, f"{argv} --resume latest", **hook("slow"))
        if saves:
            in_save += kill_in_save(run, out, saves, draw.uniform(0, 0.006))
        else:
            time.sleep(draw.uniform(0.2, 3.0))
            run.kill()
        ended = zygote.wait(run)
        assert ended.statuses == [-9], f"kill {number}: {ended.log[-3000:]}"
        if begun := begin(ended):
            lost.append(reached - begun)
        reached = last_step(out) if begun or not number else max(reached, last_step(out))
        assert "is not a whole checkpoint" not in ended.log
    resumed = zygote.run(1, out, f"{argv} --resume latest")
    assert resumed.statuses == [0], resumed.log[-3000:]
    lost.append(reached - begin(resumed))
    # A save may be over before its kill arrives, more often on fast machines.
    assert in_save >= 3
    assert resumed.metrics() == whole.metrics() and resumed.weights() == whole.weights()
    assert min(lost) >= 0 and max(lost) <= every and last_step(out) == steps
    record(
        injected=KILLS,
        of_them_in_a_save=in_save,
        survived=KILLS,
        most_steps_lost_in_one=max(lost),
        save_interval=every,
        **resumed.lost(whole),
    )


def begin(run) -> int:
    """Return the update that a run resumed after; 0 if it was killed earlier or started over."""
    found = re.search(r"resuming after update (\d+)", run.log)
    return int(found[1]) if found else 0


def kill_in_save(run, out: Path, saves: int, delay_s: float) -> bool:
    """Kill a run shortly after its `saves`-th save begins; return True if it was unfinished."""
    deadline = time.monotonic() + 60
    seen = set()
    while len(seen) < saves and time.monotonic() < deadline:
        seen |= {path.name for path in (out / "checkpoints").glob(".step_*.tmp")}
        time.sleep(0.001)
    assert len(seen) >= saves, f"no save {saves} within a minute: {run.log.read_text()[-3000:]}"
    time.sleep(delay_s)
    run.kill()
    return any((out / "checkpoints").glob(".step_*.tmp"))


def last_step(out: Path) -> int:
    """Return the step of the last whole line of metrics.jsonl."""
    path = out / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(re.match(r'\{"step": (\d+)', lines[-1])[1]) if lines else 0


@pytest.mark.parametrize("ranks, full_on", [(1, 0), (2, 1)])
def test_a_full_disk_costs_only_a_checkpoint(ranks, full_on, zygote, tmp_path, record):
    argv = f"{SFT} --max_train_steps 6 --save_interval 2"
    whole = zygote.run(1, tmp_path / "whole", argv, ranks=ranks)
    killed = zygote.run(1, tmp_path / "out", argv, ranks=ranks, kill_in_step=4)
    assert killed.checkpoints() == ["latest", "step_00000002"]
    full = zygote.run(
        1, tmp_path / "out", f"{argv} --resume latest", ranks=ranks, file_bytes={full_on: 100_000}
    )
    assert (
        "Could not save checkpoint step_00000004" in full.log
        and "File too large" in full.log
        and "the run continues" in full.log
    )
    assert full.checkpoints() == ["latest", "step_00000002"]
    assert steps_of(full) == list(range(7)), full.log[-3000:]
    if full_on == 0:  # the rank that writes the model
        assert (
            full.statuses == [1]
            and "error (rank 0)" in full.log
            and "File too large" in full.log.split("error (rank 0)")[-1]
        )
    after = zygote.run(1, tmp_path / "out", f"{argv} --resume latest", ranks=ranks)
    assert after.statuses == [0] * ranks, after.log[-3000:]
    assert after.metrics() == whole.metrics() and after.weights() == whole.weights()
    assert not list(tmp_path.glob(".out*")), "a temporary folder was left"
    record(injected=2, survived=2, **after.lost(whole))  # the kill and the disk


@pytest.mark.parametrize("step, argv, victim", [(1, SFT, 0), ("dpo", PAIRS, 1)])
def test_all_ranks_end_when_one_is_killed(step, argv, victim, zygote, tmp_path):
    started = zygote.start(step, tmp_path / "out", f"{argv} --max_train_steps 2000", ranks=2)
    started.wait_for_step(3)
    started.kill_rank(victim)
    run = zygote.wait(started, timeout_s=60)
    other = 1 - victim
    assert run.statuses[victim] == -9 and run.statuses[other] == 1, run.log[-3000:]
    assert f"error (rank {other})" in run.log and "another rank of the run has ended" in run.log


def test_a_rank_that_was_stopped_for_a_while_loses_nothing(zygote, tmp_path):
    started = zygote.start(3, tmp_path / "out", PPO.replace("_steps 6", "_steps 12"), ranks=2)
    started.wait_for_step(2)
    started.signal_rank(1, signal.SIGSTOP)
    time.sleep(3)
    assert last_step(tmp_path / "out") < 12
    started.signal_rank(1, signal.SIGCONT)
    run = zygote.wait(started)
    assert run.statuses == [0, 0] and steps_of(run)[-1] == 12, run.log[-3000:]


def test_a_rank_waiting_for_a_dead_rank_exits(zygote, tmp_path):
    started = zygote.start(
        1, tmp_path / "out", f"{SFT} --max_train_steps 20", ranks=2, **hook("deaf")
    )
    started.wait_for_step(2)
    # Rank 0 has written step 2 but may still be in its last collective, before it goes deaf.
    time.sleep(2)
    started.kill_rank(1)
    run = zygote.wait(started, timeout_s=60)
    assert run.statuses == [1, -9] and run.seconds < 60
    assert "error (rank 0): the process of rank 1 has ended" in run.log


@pytest.mark.parametrize(
    "step, argv, name",
    [
        (1, f"{SFT} --max_train_steps 6", "nan_in_sft"),
        (2, f"{PAIRS} --max_train_steps 6", "nan_in_reward"),
        ("dpo", f"{PAIRS} --max_train_steps 6", "nan_in_dpo"),
        (3, PPO, "nan_in_ppo"),
    ],
)
def test_a_nan_on_one_rank_ends_all_with_one_message(step, argv, name, zygote, tmp_path):
    run = zygote.run(step, tmp_path / "out", f"{argv} --save_interval 1", ranks=2, **hook(name))
    assert run.statuses == [1, 1]
    assert re.search(r"error \(rank 0\): .*([Uu]pdate|[Rr]ollout) 3\b.* is nan", run.log), run.log[
        -3000:
    ]
    assert run.checkpoints() == ["latest", "step_00000001", "step_00000002"]


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "nan_in_value",
            [
                "the value loss, summed over ranks, is nan",
                "The weights were not updated",
                "--critic_learning_rate",
            ],
        ),
        ("infinite_kl", ["the KL to the reference is inf", "--kl_coef", "--dtype fp16"]),
        (
            "nothing_to_say",
            ["every answer is empty", "--min_answer_len", "--actor_model_name_or_path"],
        ),
    ],
)
def test_an_unusable_rollout_ends_the_run_before_its_update(name, words, zygote, tmp_path):
    run = zygote.run(3, tmp_path / "out", f"{PPO} --save_interval 1", **hook(name))
    assert run.statuses == [1]
    (message,) = re.findall(r"error \(rank 0\): Rollout 3: .*", run.log)
    assert all(word in message for word in words), message
    assert run.checkpoints() == ["latest", "step_00000001", "step_00000002"] and steps_of(run) == [
        0,
        1,
        2,
    ]


DAMAGES = {
    "a flipped bit": lambda path: flip(next(path.glob("model/*optim_states.pt"))),
    "a flipped bit in facts": lambda path: flip(path / "facts.json"),
    "cut short": lambda path: cut(next(path.glob("model/*model_states.pt"))),
    "a missing file": lambda path: (path / "rank_00000.safetensors").unlink(),
    "a file too many": lambda path: (path / "model" / "more.pt").write_bytes(b"x"),
    "a link": lambda path: link(next(path.glob("model/*model_states.pt"))),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: cut(path / "manifest.json"),
    "an empty manifest": lambda path: (path / "manifest.json").write_text("{}"),
    "empty": lambda path: (shutil.rmtree(path), path.mkdir()),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def link(path: Path) -> None:
    moved = path.rename(path.parents[3] / "elsewhere.pt")
    path.symlink_to(moved)


@pytest.fixture(scope="module")
def two_checkpoints(zygote, tmp_path_factory) -> Path:
    """Return the output folder of a run killed in step 5, with checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("damage") / "out"
    run = zygote.run(1, out, f"{SFT} --max_train_steps 6 --save_interval 2", kill_in_step=5)
    assert run.checkpoints() == ["latest", "step_00000002", "step_00000004"], run.log[-3000:]
    return out


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    damage, two_checkpoints, tmp_path, caplog, monkeypatch, record
):
    root = tmp_path / "out" / "checkpoints"
    shutil.copytree(two_checkpoints / "checkpoints", root)
    assert newest_checkpoint(root).step == 4
    DAMAGES[damage](root / "step_00000004")
    monkeypatch.setattr("dschat.checkpoint.run_checkpoint.logger.propagate", True)
    assert newest_checkpoint(root).step == 2
    warning = caplog.records[-1].getMessage()
    assert "step_00000004 is not a whole checkpoint" in warning
    assert "Trying the one before" in warning
    with pytest.raises(ValueError, match="step_00000004 is not a whole checkpoint"):
        open_checkpoint(root / "step_00000004")
    record(injected=1, survived=1)


def test_a_checkpoint_under_the_name_of_another_update_is_ignored(two_checkpoints, tmp_path):
    root = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints / "checkpoints", root)
    (root / "step_00000004").rename(root / "step_00000009")
    with pytest.raises(
        ValueError,
        match="step_00000009 is not a whole checkpoint: facts.json belongs to another checkpoint",
    ):
        open_checkpoint(root / "step_00000009")
    assert newest_checkpoint(root).step == 2


def test_resuming_from_another_folder_keeps_existing_checkpoints(zygote, two_checkpoints, tmp_path):
    for name in ("mine", "theirs"):
        shutil.copytree(two_checkpoints, tmp_path / name)
    before = (tmp_path / "mine" / "metrics.jsonl").read_bytes()
    theirs = tmp_path / "theirs" / "checkpoints" / "step_00000002"
    run = zygote.run(
        1, tmp_path / "mine", f"{SFT} --max_train_steps 6 --save_interval 2 --resume {theirs}"
    )
    assert run.statuses == [1]
    assert (
        f"--resume {theirs} is in another folder, and --output_dir {tmp_path}/mine holds "
        "other checkpoints, up to update 4" in run.log
    )
    assert run.checkpoints() == ["latest", "step_00000002", "step_00000004"]
    assert (tmp_path / "mine" / "metrics.jsonl").read_bytes() == before


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(
    zygote, two_checkpoints, tmp_path, record
):
    argv = f"{SFT} --max_train_steps 6 --save_interval 2"
    whole = zygote.run(1, tmp_path / "whole", argv)
    shutil.copytree(two_checkpoints, tmp_path / "out")
    flip(next((tmp_path / "out" / "checkpoints" / "step_00000004").glob("model/*optim_states.pt")))
    named = zygote.run(1, tmp_path / "out", f"{argv} --resume {{out}}/checkpoints/step_00000004")
    assert named.statuses == [1]
    assert "is not a whole checkpoint" in named.log and "--resume" in named.log
    resumed = zygote.run(1, tmp_path / "out", f"{argv} --resume latest")
    assert resumed.statuses == [0], resumed.log[-3000:]
    assert "is not a whole checkpoint" in resumed.log and "resuming after update 2" in resumed.log
    assert resumed.metrics() == whole.metrics() and resumed.weights() == whole.weights()
    record(injected=2, survived=2, **resumed.lost(whole))  # the kill and the flipped bit


@pytest.mark.parametrize(
    "number, ranks, step", [(signal.SIGTERM, 1, 1), (signal.SIGINT, 2, 1), (signal.SIGTERM, 1, 3)]
)
def test_a_signal_to_one_rank_saves_and_ends_all(number, ranks, step, zygote, tmp_path, record):
    main = step
    argv = f"{SFT} --max_train_steps 8" if step == 1 else PPO.replace("_steps 6", "_steps 8")
    whole = zygote.run(main, tmp_path / "whole", argv, ranks=ranks)
    started = zygote.start(main, tmp_path / "out", argv, ranks=ranks, **hook("slow"))
    started.wait_for_step(3)
    started.signal_rank(0, number)
    stopped = zygote.wait(started)
    assert stopped.statuses == [128 + number] * ranks, stopped.log[-3000:]
    step = steps_of(stopped)[-1]
    unit = "rollout" if main == 3 else "update"
    message = f"stopped (rank 0): Received {number.name} after {unit} {step}. Checkpoint saved"
    assert message in stopped.log
    assert 3 <= step < 8 and stopped.checkpoints() == ["latest", f"step_{step:08d}"]
    resumed = zygote.run(main, tmp_path / "out", f"{argv} --resume latest", ranks=ranks)
    assert resumed.statuses == [0] * ranks, resumed.log[-3000:]
    assert resumed.metrics() == whole.metrics() and resumed.weights() == whole.weights()
    record(injected=1, survived=1, **resumed.lost(whole))


FAILING = """
calls = 0

def reward(prompts, answers, **columns):
    global calls
    calls += 1
    if calls == FATAL:
        raise OSError("the judge does not answer")
    return [float(len(answer)) for answer in answers]
"""


@pytest.mark.parametrize(
    "fatal, done",
    # The evaluation before training asks once for the scores of all prompts, and each rollout once.
    [(4, 2), (5, 3)],
    ids=["in-a-rollout", "in-an-evaluation"],
)
def test_a_reward_that_fails_ends_the_run_after_a_checkpoint(fatal, done, zygote, tmp_path, record):
    function = tmp_path / "rewards.py"
    function.write_text(FAILING.replace("FATAL", str(fatal)))
    argv = (
        f"{PPO} --reward_fn {function}:reward --advantage_estimator rloo "
        "--num_samples_per_prompt 2 --eval_interval 3"
    )
    failed = zygote.run(3, tmp_path / "out", argv)
    assert failed.statuses == [1], failed.log[-3000:]
    assert "the judge does not answer" in failed.log and "the prompt" in failed.log
    assert f"Checkpoint saved after rollout {done}" in failed.log
    assert failed.checkpoints() == ["latest", f"step_{done:08d}"] and steps_of(failed)[-1] == done
    function.write_text(FAILING.replace("FATAL", "0"))
    resumed = zygote.run(3, tmp_path / "out", f"{argv} --resume latest")
    assert resumed.statuses == [0], resumed.log[-3000:]
    assert f"{function}:reward: its file has changed since rollout {done}" in resumed.log
    assert f"resuming after rollout {done}" in resumed.log and steps_of(resumed) == list(range(7))
    record(injected=1, survived=1)
