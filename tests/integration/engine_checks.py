"""Functions for the worker: engines that step together or not at all, and whole ZeRO-3 weights."""

import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file

from dschat.algorithms.types import PromptBatch
from dschat.config.options import ScheduleOptions, SystemOptions
from dschat.data.row import Row
from dschat.engine.build import (
    build_inference_engine,
    build_training_engine,
    override,
    partitioned_loading,
)
from dschat.engine.device import TORCH_DTYPES, on_cpu
from dschat.engine.ds_config import inference_config, training_config
from dschat.engine.optim import step_together
from dschat.engine.zero import full_tensors, gathered, scale_parameter
from dschat.models.causal_lm import load_causal_lm
from dschat.models.forward import forward_logits
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer
from dschat.runtime import dist
from dschat.trainers.rewards import RetokenisedReward, RewardFailure, WeightedRewards
from dschat.trainers.rollout import SampledAnswers


def planted(
    stock: str, *, zero: int, dtype: str, offload: bool, accumulation: int, value: str
) -> dict:
    """Check two engines of which one gets a bad gradient, on rank 1 alone; all entries should be
    true.

    Args:
        accumulation: micro-batches of a step; the bad gradient is in the first.
        value: "inf" or "nan", at one place of one parameter.
    """
    options = dict(zero=zero, dtype=dtype, offload=offload, accumulation=accumulation)
    actor = training_engine(f"{stock}/sft/llama", load_causal_lm, stock, **options)
    critic = training_engine(f"{stock}/reward/llama", load_reward_model, stock, **options)
    engines = (actor, critic)
    plant = Plant(critic, float(value))
    start = snapshots(engines)
    first = [window(engines, micro) for micro in range(accumulation)]
    sound = snapshots(engines)
    plant.armed = dist.rank() == 1
    second = []
    for micro in range(accumulation):
        second.append(window(engines, micro))
        plant.armed = False
    bad = snapshots(engines)
    third = [window(engines, micro) for micro in range(accumulation)]
    after = snapshots(engines)
    return {
        "was planted": plant.done == (dist.rank() == 1),
        "sound steps are taken": all(first) and all(third),
        "a bad step is told, by every rank": second == [True] * (accumulation - 1) + [False],
        "sound steps move both": moved(start, sound) == [True, True]
        and moved(bad, after) == [True, True],
        "a bad step moves neither": moved(sound, bad) == [False, False],
        "all stays finite": all(
            t.isfinite().all().item() for engine in after for t in engine.values()
        ),
        "no micro-step is open": all(engine.micro_steps % accumulation == 0 for engine in engines),
    }


class Plant:
    """A hook that puts a value into the gradient of one matrix while it is armed."""

    def __init__(self, engine, value: float):
        self.value = value
        self.armed = False
        self.done = False
        parameter = next(p for name, p in engine.module.named_parameters() if "down_proj" in name)
        parameter.register_hook(self._spoil)

    def _spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        if not self.armed:
            return gradient
        self.done = True
        gradient = gradient.clone()
        gradient.view(-1)[7] = self.value
        return gradient


def training_engine(
    path: str,
    load,
    stock: str,
    *,
    zero: int,
    dtype: str,
    offload: bool,
    accumulation: int,
    persistent: int | None = None,
):
    """Return an engine that trains the model at `path`, read by `load`.

    Args:
        persistent: elements up to which ZeRO-3 keeps a parameter whole; None: the usual number.
    """
    system = SystemOptions(zero_stage=zero, offload=offload)
    ds_config = training_config(
        system,
        dtype=dtype,
        micro_batch_size=2,
        gradient_accumulation_steps=accumulation,
        world_size=dist.world_size(),
        on_cpu=on_cpu(),
    )
    ds_config = override(ds_config, f"{stock}/fp16.json" if dtype == "fp16" else None)
    if persistent is not None:
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = persistent
    with partitioned_loading(ds_config):
        model = load(path, dtype=TORCH_DTYPES[dtype], tokenizer=load_tokenizer(path))
    return build_training_engine(
        model,
        ds_config=ds_config,
        schedule=ScheduleOptions(lr_scheduler_type="constant"),
        total_steps=3,
        learning_rate=1e-2,
        weight_decay=0.1,
    )


def here(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's device; the same cases run on GPUs if there are enough."""
    return tensor.to(get_accelerator().current_device_name())


def window(engines, micro: int) -> bool:
    """Run one micro-step of both engines on texts that differ between ranks."""
    draw = torch.Generator().manual_seed(2 * micro + dist.rank())
    ids = here(torch.randint(3, 259, (2, 10), generator=draw))
    mask = torch.ones_like(ids)
    actor, critic = engines
    logits = forward_logits(actor, actor.module, input_ids=ids, attention_mask=mask)
    actor.backward(
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        )
    )
    critic.backward(((critic(input_ids=ids, attention_mask=mask) - 1.0) ** 2).mean())
    return step_together(actor, critic)


def snapshots(engines) -> list[dict[str, torch.Tensor]]:
    """Return this rank's part of each engine: model weights, master weights and moments."""
    return [snapshot(engine) for engine in engines]


def snapshot(engine) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in engine.module.named_parameters():
        found[name] = getattr(parameter, "ds_tensor", parameter).detach().clone()
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for number, (parameter, state) in enumerate(inner.state.items()):
        tensors = {"master": parameter, **state}
        found |= {
            f"{number}.{key}": t.detach().clone()
            for key, t in tensors.items()
            if torch.is_tensor(t)
        }
    return found


def moved(before: list[dict], after: list[dict]) -> list[bool]:
    """Return for each engine whether anything in it differs, to the bit."""
    pairs = zip(before, after)
    return [
        set(a) != set(b) or any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairs
    ]


def whole_weights(stock: str, *, family: str, dtype: str, reward: bool) -> dict:
    """Compare gathered ZeRO-3 weights with the file they came from; all entries should be true."""
    path = f"{stock}/{'reward' if reward else 'sft'}/{family}"
    options = dict(zero=3, dtype=dtype, offload=False, accumulation=1)
    engine = training_engine(
        path, load_reward_model if reward else load_causal_lm, stock, **options
    )
    in_pieces = all(hasattr(p, "ds_id") for p in engine.module.parameters())
    found = full_tensors(engine.module)
    expected = {
        name: t.to(TORCH_DTYPES[dtype])
        for name, t in load_file(f"{path}/model.safetensors").items()
    }
    prefix = "model." if reward else ""
    result = {"in pieces": in_pieces, "only rank 0 holds them": bool(found) == dist.is_main()}
    if dist.is_main():
        own = {prefix + name: tensor for name, tensor in expected.items()}
        tied = {"lm_head.weight"} if family in ("opt", "gpt2") and not reward else set()
        result["equal"] = all(torch.equal(found[name], tensor) for name, tensor in own.items())
        result["tied ones keep both names"] = set(found) - set(own) == tied
        result["on the CPU, apart"] = all(
            t.device.type == "cpu" and t.data_ptr() for t in found.values()
        )
    return result


def fresh_heads(stock: str) -> dict:
    """Compare new reward heads with and without ZeRO-3; all entries should be true."""
    path = f"{stock}/base/llama"
    heads, following = [], []
    for zero in (0, 3):
        config = inference_config(
            SystemOptions(zero_stage=zero),
            dtype="fp32",
            micro_batch_size=2,
            world_size=dist.world_size(),
        )
        torch.manual_seed(5)
        with partitioned_loading(config):
            model = load_reward_model(path, dtype=torch.float32, tokenizer=load_tokenizer(path))
        following.append(torch.rand(3))
        head = model.model.score.weight
        with gathered([head]):
            heads.append(head.detach().clone().cpu())
    return {
        "equal": torch.equal(*heads),
        "of the right size": abs(heads[0].std().item() * 65**0.5 - 1) < 0.3,
        "the generator continues alike": torch.equal(*following),
    }


def scaled_head(stock: str, *, zero: int) -> dict:
    """Check that a head divided by 4 gives values divided by 4; all entries should be true."""
    path = f"{stock}/reward/llama"
    config = inference_config(
        SystemOptions(zero_stage=zero),
        dtype="fp32",
        micro_batch_size=2,
        world_size=dist.world_size(),
    )
    with partitioned_loading(config):
        model = load_reward_model(path, dtype=torch.float32, tokenizer=load_tokenizer(path))
    engine = build_inference_engine(model, ds_config=config)
    ids = here(torch.arange(3, 23).view(2, 10))
    with torch.no_grad():
        before = engine(input_ids=ids, attention_mask=torch.ones_like(ids))
        scale_parameter(model.model.score.weight, 0.25)
        after = engine(input_ids=ids, attention_mask=torch.ones_like(ids))
    return {
        "scaled": torch.equal(after, 0.25 * before),
        "not zero": before.abs().max().item() > 0,
        "without gradient, in eval mode": not any(p.requires_grad for p in model.parameters())
        and not model.training,
        "partitioned where it should be": (zero == 3)
        == any(hasattr(p, "ds_id") for p in model.parameters()),
    }


class OnePrompt:
    """A data set of one prompt."""

    def prompt_text(self, index: int) -> str:
        return "p"

    def row(self, index: int) -> Row:
        return Row("p")


def refused_prompt(stock: str, *, zero: int) -> str:
    """Return the error of a reward whose chat template refuses a prompt on rank 1 alone."""
    path = f"{stock}/reward/llama"
    tokenizer = load_tokenizer(path)
    config = inference_config(
        SystemOptions(zero_stage=zero),
        dtype="fp32",
        micro_batch_size=1,
        world_size=dist.world_size(),
    )
    with partitioned_loading(config):
        model = load_reward_model(path, dtype=torch.float32, tokenizer=tokenizer)
    tokenizer.chat_template = (
        "{{ raise_exception('not this one') }}"
        if dist.rank() == 1
        else "{{ messages[0]['content'] }}"
    )
    reward = RetokenisedReward(
        build_inference_engine(model, ds_config=config), "m", tokenizer, prompt_format="chat"
    )
    ids = here(torch.tensor([[5, 6]]))
    ones = torch.ones_like(ids)
    prompts = PromptBatch(ids[:, :1], ones[:, :1], torch.zeros_like(ids[0, :1]))
    answers = SampledAnswers(
        prompts, ids, ones, response_mask=ones[:, 1:].bool(), ended=ones[:, 0].bool()
    )
    try:
        WeightedRewards([reward], [], OnePrompt(), tokenizer)(answers)
    except RewardFailure as error:
        return str(error)
    return ""
