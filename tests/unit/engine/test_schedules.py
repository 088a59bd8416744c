"""Learning-rate schedules of runs that are as short as their warm-up."""

from typing import get_args

import pytest
import torch

from dschat.config.options import ScheduleOptions, Scheduler
from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.engine.build import make_scheduler


def rates(kind: str, *, total: int, warmup: int = 0, ratio: float | None = None) -> list[float]:
    """Return the learning rate of each update of a run, with the rate 1 as the highest."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = ScheduleOptions(lr_scheduler_type=kind, num_warmup_steps=warmup, warmup_ratio=ratio)
    scheduler = make_scheduler(optimizer, schedule, total_steps=total)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("kind", [kind for kind in get_args(Scheduler) if kind != "constant"])
@pytest.mark.parametrize("warmup", [4, 100])
def test_a_warmup_as_long_as_the_run_rises_to_the_end(kind, warmup, caplog):
    assert rates(kind, warmup=warmup, total=4) == [0.0, 0.25, 0.5, 0.75]
    assert "has 4 updates and never reaches its learning rate" in caplog.text
    assert f"--num_warmup_steps {warmup}" in caplog.text


def test_a_polynomial_falls_after_its_warmup():
    assert rates("polynomial", warmup=2, total=4) == pytest.approx([0, 0.5, 1, 0.5], abs=1e-6)


def test_a_run_of_one_update_that_changes_nothing_is_warned_of(caplog):
    assert rates("cosine", warmup=1, total=1) == [0.0]
    assert "does not change" in caplog.text and "--num_warmup_steps 0" in caplog.text


def test_a_shorter_warmup_is_no_warning(caplog):
    caplog.set_level("INFO")
    assert rates("linear", warmup=1, total=3)[:2] == [0.0, 1.0]
    assert "1 of 3 updates warm up; the first has learning rate 0" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    assert rates("constant", warmup=9, total=2) == [1.0, 1.0]
    assert not caplog.records


def test_a_warmup_can_be_a_share_of_the_run(caplog):
    caplog.set_level("INFO")
    found = rates("constant_with_warmup", ratio=0.5, total=5)
    assert found == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert "--warmup_ratio 0.5: 2 of 5 updates warm up" in caplog.text
    # Unlike a number of updates, a share leaves the only update of a run its rate.
    assert rates("constant_with_warmup", ratio=0.1, total=1) == [1.0]
    assert rates("polynomial", ratio=1.0, total=4) == [0.0, 0.25, 0.5, 0.75]
    assert "never reaches its learning rate. Give --warmup_ratio 0.1, or" in caplog.text


def test_a_share_is_not_changed_by_rounding():
    counts = [ScheduleOptions(warmup_ratio=n / 100).warmup_updates(100) for n in range(101)]
    assert counts == list(range(101))


def test_each_model_of_step_3_warms_up_for_a_share_of_its_own_updates():
    # 10 rollouts of 2 updates; in 5 of them only the critic learns.
    flags = (
        "--actor_model_name_or_path a --critic_model_name_or_path c --warmup_ratio 0.2 "
        "--per_device_generation_batch_size 16 --per_device_training_batch_size 8 "
        "--critic_warmup_steps 5 --max_train_steps 10"
    )
    config = parse_config(PPOConfig, flags.split())
    updates = {role: 20 - config.updates_left_out(role) for role in ("actor", "critic")}
    warmups = {role: config.schedule.warmup_updates(count) for role, count in updates.items()}
    assert (updates, warmups) == ({"actor": 10, "critic": 20}, {"actor": 2, "critic": 4})
