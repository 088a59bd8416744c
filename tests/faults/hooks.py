"""Hooks that `zygote.py` may run before a main begins: ``function(rank)``."""

import time
from dataclasses import replace

import torch
from deepspeed.accelerator import get_accelerator

from dschat.algorithms.types import Experience
from dschat.runtime import log
from dschat.trainers import ppo
from dschat.trainers.dpo import DPOObjective
from dschat.trainers.ppo import DeepSpeedPPOTrainer
from dschat.trainers.supervised import RewardObjective, SFTObjective

BAD_STEP = 3


def nan_in_sft(rank: int) -> None:
    """Make the loss of update 3 NaN on rank 1."""
    nan_in_loss_of(SFTObjective, rank)


def nan_in_dpo(rank: int) -> None:
    """Make the loss of update 3 NaN on rank 1."""
    nan_in_loss_of(DPOObjective, rank)


def nan_in_reward(rank: int) -> None:
    """Make the loss of update 3 NaN on rank 1."""
    nan_in_loss_of(RewardObjective, rank)


def nan_in_loss_of(objective: type, rank: int) -> None:
    log.OTHER_RANKS_WAIT_S = 0.5
    loss_sum = objective.loss_sum
    calls = []

    def spoiled(self, engine, batch):
        calls.append(1)
        loss, extra = loss_sum(self, engine, batch)
        return (loss * float("nan") if rank == 1 and len(calls) == BAD_STEP else loss), extra

    objective.loss_sum = spoiled


def nan_in_ppo(rank: int) -> None:
    """Make the actor's loss NaN in the first update of rollout 3, on rank 1."""
    log.OTHER_RANKS_WAIT_S = 0.5
    actor_loss = DeepSpeedPPOTrainer._actor_loss

    def spoiled(self, batch: Experience):
        loss, *rest = actor_loss(self, batch)
        return (loss * float("nan") if rank == 1 and self.rollouts + 1 == BAD_STEP else loss), *rest

    DeepSpeedPPOTrainer._actor_loss = spoiled


def nan_in_value(rank: int) -> None:
    """Make the critic's loss NaN in the first update of rollout 3."""
    critic_loss = DeepSpeedPPOTrainer._critic_loss

    def spoiled(self, batch: Experience):
        loss, sums = critic_loss(self, batch)
        return (loss * float("nan") if self.rollouts + 1 == BAD_STEP else loss), sums

    DeepSpeedPPOTrainer._critic_loss = spoiled


def infinite_kl(rank: int) -> None:
    """Let the reference give the answers zero probability after two rollouts."""
    make = ppo.make_experience

    def spoiled(*args, **kwargs):
        experience = make(*args, **kwargs)
        spoiled.calls += 1
        if spoiled.calls != BAD_STEP:
            return experience
        return replace(
            experience, ref_logprobs=torch.full_like(experience.ref_logprobs, -float("inf"))
        )

    spoiled.calls = 0
    ppo.make_experience = spoiled


def nothing_to_say(rank: int) -> None:
    """Let every answer be an end token alone after two rollouts."""
    generate = ppo.generate
    calls = []

    def silent(*args, **kwargs):
        batches = generate(*args, **kwargs)
        calls.append(1)
        if len(calls) < BAD_STEP:
            return batches
        return [ended_at_once(answers) for answers in batches]

    ppo.generate = silent


def ended_at_once(answers):
    """Return `answers` with masks that leave their first tokens only."""
    first = torch.arange(answers.response_mask.shape[1], device=answers.response_mask.device) == 0
    mask = first.expand_as(answers.response_mask)
    prompts = answers.attention_mask[:, : -mask.shape[1]]
    attended = torch.cat([prompts, mask.to(prompts.dtype)], -1)
    return replace(
        answers,
        response_mask=mask,
        attention_mask=attended,
        ended=torch.ones_like(answers.ended),
    )


def deaf(rank: int) -> None:
    """Keep rank 0 in update 3 without end, as a GPU collective that waits for a dead rank would."""
    weight = SFTObjective.weight
    calls = []

    def waiting(self, batch):
        calls.append(1)
        if rank == 0 and len(calls) == BAD_STEP:
            time.sleep(1e6)
        return weight(self, batch)

    SFTObjective.weight = waiting


def slow(rank: int) -> None:
    """Slow updates down, so that a signal arrives in the middle of one."""
    weight = SFTObjective.weight

    def slowly(self, batch):
        time.sleep(0.05)
        return weight(self, batch)

    SFTObjective.weight = slowly
    train = DeepSpeedPPOTrainer.train_rlhf
    DeepSpeedPPOTrainer.train_rlhf = lambda self, experience: (
        time.sleep(0.1),
        train(self, experience),
    )[1]


def half_precision(rank: int) -> None:
    """Allow fp16 on CPUs for which DeepSpeed declines it; torch computes it, only slowly."""
    get_accelerator().is_fp16_supported = lambda: True


def no_pickle(rank: int) -> None:
    """End the run if it reads or writes a pickle."""

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle")

    torch.load = torch.save = refuse


def told_pickles(rank: int) -> None:
    """Print every file that torch.load reads."""
    load = torch.load

    def telling(path, *args, **kwargs):
        print(f"torch.load {path}", flush=True)
        return load(path, *args, **kwargs)

    torch.load = telling
