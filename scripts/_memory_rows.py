"""The rows of bench_training_memory.py and their measurement, in a separate process for each."""

import contextlib
import resource
import time
from dataclasses import dataclass, replace

GB = 10**9
LORA = "--only_optimize_lora --{0}lora_dim 64 --{0}lora_alpha 64 --{0}gradient_checkpointing"
PPO_LORA = f"{LORA.format('actor_')} {LORA.format('critic_').replace('--only_optimize_lora ', '')}"
ZERO2 = "--actor_zero_stage 2 --critic_zero_stage 2"
ZERO3 = "--actor_zero_stage 3 --critic_zero_stage 3"


@dataclass(frozen=True)
class MemoryRow:
    """A measurement: a step, its models and sizes, its flags, and the memory that it may take."""

    step: int
    model: str  # step 3: the actor
    flags: str
    critic: str = ""
    rows: int = 4  # texts, pairs or prompts per update
    prompt: int = 256  # tokens; steps 1 and 2 train on prompt + answer
    answer: int = 256
    cap_gb: float | None = None  # 10^9 bytes
    min_gpus_gib: int = 0  # of all GPUs together
    min_host_gib: int = 0


ROWS = {
    "sft-7b-lora-offload-32gb": MemoryRow(
        1, "llama-2-7b", f"--zero_stage 2 --offload {LORA.format('')}", cap_gb=32
    ),
    "rm-7b-lora-offload-32gb": MemoryRow(
        2, "llama-2-7b", f"--zero_stage 2 --offload {LORA.format('')}", cap_gb=32, rows=2
    ),
    "ppo-7b-lora-offload-32gb": MemoryRow(
        3, "llama-2-7b", f"{ZERO2} --offload {PPO_LORA}", critic="llama-2-7b", cap_gb=32, answer=128
    ),
    "ppo-13b-lora": MemoryRow(
        3, "opt-13b", f"{ZERO2} {PPO_LORA}", critic="opt-350m", rows=16, answer=128
    ),
    "ppo-30b-lora-shared": MemoryRow(
        3, "opt-30b", f"{ZERO2} {PPO_LORA}", critic="opt-350m", answer=128
    ),
    "ppo-7b-lora": MemoryRow(
        3, "llama-2-7b", f"{ZERO2} {PPO_LORA}", critic="llama-2-7b", answer=128
    ),
    "ppo-7b-lora-mixz": MemoryRow(
        3,
        "llama-2-7b",
        f"{ZERO2} {PPO_LORA} --enable_mixed_precision_lora",
        critic="llama-2-7b",
        answer=128,
    ),
    "ppo-7b-zero3-lora": MemoryRow(
        3, "llama-2-7b", f"{ZERO3} {PPO_LORA}", critic="opt-350m", answer=32
    ),
    "ppo-7b-zero3-lora-mixz": MemoryRow(
        3,
        "llama-2-7b",
        f"{ZERO3} {PPO_LORA} --enable_mixed_precision_lora",
        critic="opt-350m",
        answer=32,
    ),
    "ppo-13b-lora-idle-states": MemoryRow(
        3,
        "opt-13b",
        f"{ZERO2} {PPO_LORA} --offload_idle_states",
        critic="opt-350m",
        rows=16,
        answer=128,
    ),
    "ppo-30b-lora-mixz": MemoryRow(
        3,
        "opt-30b",
        f"{ZERO2} {PPO_LORA} --enable_mixed_precision_lora",
        critic="opt-13b",
        answer=128,
    ),
    # In host memory, by the plan: 143 GiB of master weights and moments, 72 GiB of gradients and
    # of weights in bf16.
    "ppo-13b-full-offload": MemoryRow(
        3,
        "opt-13b",
        f"{ZERO2} --offload --no_pin_memory "
        "--actor_gradient_checkpointing --critic_gradient_checkpointing",
        critic="opt-350m",
        answer=128,
        min_host_gib=240,
    ),
    # All weights train. This needs one GPU of 141 GB or two of 80; run it on more to see how it
    # scales.
    "sft-7b-zero3-full": MemoryRow(
        1, "llama-2-7b", "--zero_stage 3 --gradient_checkpointing", min_gpus_gib=110
    ),
    "ppo-7b-zero3-full": MemoryRow(
        3,
        "llama-2-7b",
        f"{ZERO3} --actor_gradient_checkpointing --critic_gradient_checkpointing "
        "--enable_hybrid_engine --no_compile --unpin_actor_parameters",
        critic="opt-350m",
        answer=128,
        min_gpus_gib=138,
    ),
}


class Meter:
    """Peaks of the allocator (on a CPU: of the process) and seconds, for each phase."""

    def __init__(self, torch):
        self.torch = torch
        self.on_gpu = torch.cuda.is_available()
        self.peak_gib: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str):
        """Measure the block as a phase.

        If the phase was measured before, the seconds are replaced, and the larger peak is kept.
        """
        if self.on_gpu:
            self.torch.cuda.synchronize()
            self.torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        yield
        if self.on_gpu:
            self.torch.cuda.synchronize()
        self.seconds[name] = time.monotonic() - started
        peak = self.torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else host_gib()
        self.peak_gib[name] = max(peak, self.peak_gib.get(name, 0))
        self.peak_gib["all"] = max(self.peak_gib.values())
        # If the row fails later, its log shows what it needed until then.
        print(
            f"{name}: {self.seconds[name]:.1f} s, {peak:.1f} GiB; host {host_gib():.1f} GiB",
            flush=True,
        )


def host_gib() -> float:
    """Return the peak of this process's host memory, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_row(name: str, *, tiny: bool, rollouts: int, ppo_flags: str = "") -> dict:
    """Measure one row in this process.

    Args:
        name: a key of ROWS.
        tiny: use miniature models and sizes.
        rollouts: number of updates (step 3: of rollouts); the last one is timed.
        ppo_flags: further flags of step 3.

    Returns:
        The row's sizes and flags, its peaks in GiB, seconds and tokens per second.
    """
    import torch

    from dschat.engine.build import start_processes
    from dschat.runtime import dist
    from dschat.runtime.hardware import hardware, versions
    from dschat.runtime.log import set_up_logging

    row = ROWS[name]
    if row.step == 3 and ppo_flags:
        row = replace(row, flags=f"{row.flags} {ppo_flags}")
    start_processes()
    set_up_logging()
    if row.cap_gb and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, row.cap_gb * GB / total))
    meter = Meter(torch)
    sizes = (2, 8, 4) if tiny else (row.rows, row.prompt, row.answer)
    measure = measure_ppo if row.step == 3 else measure_supervised
    facts = measure(row, meter, sizes=sizes, tiny=tiny, rollouts=rollouts)
    return {
        "row": name,
        "step": row.step,
        "model": row.model,
        "critic": row.critic,
        "flags": row.flags,
        "rows": sizes[0],
        "prompt_tokens": sizes[1],
        "answer_tokens": sizes[2],
        "cap_gb": row.cap_gb,
        "gpus": dist.world_size(),
        "peak_gib": {phase: round(value, 2) for phase, value in meter.peak_gib.items()},
        "seconds": {phase: round(value, 2) for phase, value in meter.seconds.items()},
        "host_gib": round(host_gib(), 1),
        **facts,
        "hardware": hardware(),
        "versions": versions(),
    }


def random_model(shape: str, *, dtype, tiny: bool, head: bool):
    """Return a model of `shape` with random weights, made on the device that it will stay on.

    Args:
        shape: a shape of ``dschat.models.families``.
        dtype: the torch dtype of the weights.
        tiny: use the miniature shape of the family instead.
        head: return a reward model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.integrations import is_deepspeed_zero3_enabled

    from dschat.models.families import shape_config
    from dschat.models.reward_model import RewardModel

    if tiny:
        shape = "tiny-llama" if "llama" in shape else "tiny-opt"
    config = shape_config(shape)
    config.pad_token_id = 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Under ZeRO-3 transformers makes the model in partitions, on their own devices.
    with contextlib.nullcontext() if is_deepspeed_zero3_enabled() else torch.device(device):
        if not head:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        config.num_labels = 1
        return RewardModel(AutoModelForSequenceClassification.from_config(config, dtype=dtype))


def random_ids(rows: int, length: int, seed: int):
    """Return random token ids [rows, length] that are in every shape's vocabulary."""
    import torch

    return torch.randint(3, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def measure_supervised(
    row: MemoryRow, meter: Meter, *, sizes: tuple[int, int, int], tiny: bool, rollouts: int
) -> dict:
    """Measure updates of step 1 or 2; see ``run_row``."""
    import torch

    from dschat.algorithms.types import PairBatch, TextBatch
    from dschat.config.parse import parse_config
    from dschat.config.reward import RewardConfig
    from dschat.config.sft import SFTConfig
    from dschat.engine.optim import step_together
    from dschat.runtime import dist
    from dschat.trainers.supervised import RewardObjective, SFTObjective
    from dschat.trainers.supervised_run import SupervisedRun, build_engine

    rows, prompt, answer = sizes
    texts = rows if row.step == 1 else 2 * rows
    flags = f"--model_name_or_path {row.model} --dtype {'fp32' if tiny else 'bf16'} {row.flags}"
    flags += f" --per_device_train_batch_size {rows} --max_seq_len {prompt + answer}"
    config = parse_config(SFTConfig if row.step == 1 else RewardConfig, flags.split())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load(path: str, *, dtype, **_):
        return random_model(path, dtype=dtype, tiny=tiny, head=row.step == 2)

    with meter.phase("load"):
        run = SupervisedRun(row.step, config, device, config.model.dtype, None, 2, None)
        engine = build_engine(run, load, total_steps=rollouts)
    objective = SFTObjective() if row.step == 1 else RewardObjective()
    losses = []
    for step in range(rollouts):
        ids = random_ids(texts, prompt + answer, step)
        mask = torch.ones_like(ids)
        if row.step == 1:
            batch = TextBatch(ids, mask, ids).to(device)
        else:
            batch = PairBatch(ids, mask, ids, torch.zeros(len(ids))).to(device)
        with meter.phase("update"):
            engine.train()
            loss, _ = objective.loss_sum(engine, batch)
            engine.backward(loss / objective.weight(batch))
            assert step_together(engine)
        losses.append((loss / objective.weight(batch)).item())
    tokens_per_s = dist.world_size() * ids.numel() / meter.seconds["update"]
    return {
        "losses": losses,
        "weights_gib": weights_gib(engine),
        "tokens_per_s": round(tokens_per_s, 1),
    }


def measure_ppo(
    row: MemoryRow, meter: Meter, *, sizes: tuple[int, int, int], tiny: bool, rollouts: int
) -> dict:
    """Measure rollouts of step 3 and the updates on them; see ``run_row``."""
    import torch

    from dschat.algorithms.types import PromptBatch
    from dschat.config.parse import parse_config
    from dschat.config.ppo import PPOConfig
    from dschat.engine.build import partitioned_loading
    from dschat.engine.device import TORCH_DTYPES
    from dschat.models.dropout import disable_dropout
    from dschat.runtime import dist
    from dschat.trainers.ppo import DeepSpeedPPOTrainer
    from dschat.trainers.rewards import ModelReward
    from dschat.trainers.rlhf_engine import DeepSpeedRLHFEngine, ModelSource

    rows, prompt, answer = sizes
    flags = f"--actor_model_name_or_path {row.model} --critic_model_name_or_path {row.critic}"
    flags += f" {row.flags} --dtype {'fp32' if tiny else 'bf16'} --max_prompt_seq_len {prompt}"
    flags += f" --max_answer_seq_len {answer} --min_answer_len {answer} --num_warmup_steps 0"
    flags += "".join(
        f" --per_device_{kind}_batch_size {rows}" for kind in ("generation", "training", "eval")
    )
    config = parse_config(PPOConfig, flags.split())

    class RandomEngines(DeepSpeedRLHFEngine):
        def _load(self, source: ModelSource, ds_config: dict):
            is_critic = source.flag.startswith("--critic")
            with partitioned_loading(ds_config):
                model = random_model(
                    source.path, dtype=TORCH_DTYPES[self.dtype], tiny=tiny, head=is_critic
                )
            disable_dropout(model)
            return model

    with meter.phase("load"):
        engines = RandomEngines(
            config, tokenizer=None, dtype=config.model.dtype, total_steps=rollouts
        )
        reward = ModelReward(
            engines.add_reward(row.critic, flag="--critic_model_name_or_path", tokenizer=None),
            row.critic,
        )
        engines.build_critic(tokenizer=None, score_std=1.0)
    trainer = DeepSpeedPPOTrainer(
        engines,
        config,
        lambda answers: reward(answers, None).values,
        eos_token_ids=(2,),
        pad_token_id=1,
    )
    kl = []
    for step in range(rollouts):
        ids = random_ids(rows, prompt, step)
        prompts = PromptBatch(ids, torch.ones_like(ids), torch.arange(rows))
        with meter.phase("rollout"):
            experience, _, metrics = trainer.generate_experience([prompts])
        with meter.phase("update"):
            trainer.train_rlhf(experience)
        assert experience.response_mask.shape[1] == answer
        kl.append(metrics["objective/kl"])
    meter.seconds["generate"] = metrics["time/generate_s"]
    meter.seconds["score"] = metrics["time/score_s"]
    tokens = dist.world_size() * rows * (prompt + answer)
    seconds = meter.seconds["rollout"] + meter.seconds["update"]
    return {
        "kl": kl,
        "shares_reference": config.shares_reference,
        "shares_reward": config.shares_reward,
        "weights_gib": weights_gib(engines.actor) + weights_gib(engines.critic),
        "tokens_per_s": round(tokens / seconds, 1),
    }


def weights_gib(engine) -> float:
    """Return the GiB of an engine's weights in the types that they are stored in."""
    from dschat.engine.quantized import weight_bytes

    return round(weight_bytes(engine.module) / 2**30, 2)
