"""One case of bench_memory.py: run a step on random weights, measure and predict its memory."""

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
import weakref
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
STEPS = {
    1: "step1_supervised_finetuning",
    2: "step2_reward_model_finetuning",
    3: "step3_rlhf_finetuning",
}
# Shapes that replace the published ones with --tiny: wide enough to matter, with few layers.
TINY = {
    "opt": dict(hidden=256, layers=4, heads=4, vocab=4096),
    "llama": dict(hidden=256, layers=4, heads=4, kv_heads=4, vocab=4096),
}


class CudaMeter:
    """The sum of live tensors, as the CUDA allocator counts it."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self) -> tuple[int, int]:
        """Return the peak since the last call and the present sum, in bytes."""
        import torch

        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak, torch.cuda.memory_allocated()


def host_meter():
    """Return a meter for a CPU, with the interface of CudaMeter.

    The CPU's allocator does not count, so the meter counts every storage that an operation takes
    or returns.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class HostMeter(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.live = 0
            self.peak = 0
            self._seen = weakref.WeakKeyDictionary()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for leaf in tree_leaves((result, args)):
                if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                    self._count(leaf.untyped_storage())
            return result

        def _count(self, storage) -> None:
            if storage in self._seen:
                return
            size = storage.nbytes()
            self._seen[storage] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, size)

        def _release(self, size: int) -> None:
            self.live -= size

        def read(self) -> tuple[int, int]:
            peak = self.peak
            self.peak = self.live
            return peak, self.live

    return HostMeter()


def measure(step: int, models: tuple[str, ...], flags: str, *, tiny: bool) -> dict:
    """Run the step in this process, and predict and measure its memory.

    Args:
        step: 1, 2 or 3.
        models: published shapes: the model, or actor and critic.
        flags: flags of the step's main, without models and data.
        tiny: use miniature shapes instead.

    Returns:
        The predicted and measured peaks in bytes, of the run and of each phase.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory(prefix="bench_memory.") as folder:
        paths = [
            write_model(Path(folder) / f"model{i}", name, tiny=tiny)
            for i, name in enumerate(models)
        ]
        write_rows(Path(folder) / "rows.jsonl")
        argv = step_argv(step, paths, folder) + flags.split()
        plan = predict(step, argv)
        meter = CudaMeter() if on_gpu else host_meter()
        peaks: dict[str, int] = {}
        with meter, instrumented(meter, peaks), random_weights(step):
            run_main(step, argv)
            record(peaks, "end", meter)
    measured = max(peaks.values())
    phase, predicted = plan.peak
    on_host = sum(model.host for model in plan.models.values())
    if not on_gpu:
        predicted += on_host  # host and device share one memory
    return {
        "predicted": predicted,
        "measured": measured,
        "relative_error": predicted / measured - 1.0,
        "predicted_phase": phase,
        "predicted_phases": plan.phases,
        "predicted_host": on_host,
        "measured_phases": peaks,
        "flags": flags,
        "models": models,
    }


def step_argv(step: int, paths: list[str], folder: str) -> list[str]:
    """Return the flags of a step's main that all its cases share."""
    flags = f"--data_output_path {folder}/cache --data_path {folder}/rows.jsonl"
    # The rows are longer than the limits; "share" cuts both prompt and answer.
    flags += " --truncation share --max_train_steps 2 --log_interval_s 1"
    if step == 3:
        flags += f" --actor_model_name_or_path {paths[0]} --critic_model_name_or_path {paths[1]}"
        flags += " --eval_prompts 4 --per_device_eval_batch_size 4 --max_prompt_seq_len 256"
        flags += " --num_warmup_steps 0 --data_split 0,0,1"
    else:
        flags += f" --model_name_or_path {paths[0]}"
        flags += " --per_device_eval_batch_size 4 --max_seq_len 512"
        flags += " --data_split 1,0,0" if step == 1 else " --data_split 0,1,0"
    return flags.split()


def write_model(folder: Path, name: str, *, tiny: bool) -> str:
    """Write a model folder without weights: a shape's configuration and a byte-level tokenizer."""
    from safetensors.torch import save_file

    from dschat.demo.tiny_models import byte_tokenizer
    from dschat.models.families import SHAPES, tiny_shape

    shape = SHAPES[name]
    if tiny:
        shape = tiny_shape(shape.family, **TINY[shape.family])
    config = shape.config()
    config.max_position_embeddings = max(config.max_position_embeddings, 1024)
    config.bos_token_id = 1
    config.eos_token_id = 2
    config.pad_token_id = 0
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    # A file without tensors makes the folder look complete; no weights are read.
    save_file({}, folder / "model.safetensors")
    return str(folder)


def write_rows(path: Path) -> None:
    """Write rows with prompts longer than any limit here and answers that fill half of it."""
    words = "abcdefghijklmnopqrstuvwxyz"
    rows = [
        {
            "prompt": (words * 40)[i : i + 700],
            "chosen": (words * 20)[i:][:300],
            "rejected": (words * 20)[i + 1 :][:300],
        }
        for i in range(80)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def predict(step: int, argv: list[str]):
    """Return the memory plan for the same flags."""
    from dschat.config.parse import parse_config
    from dschat.config.ppo import PPOConfig
    from dschat.config.reward import RewardConfig
    from dschat.config.sft import SFTConfig
    from dschat.memory.plan import plan_step

    config = parse_config({1: SFTConfig, 2: RewardConfig, 3: PPOConfig}[step], argv)
    return plan_step(config, world_size=1, dtype=config.model.dtype)


@contextlib.contextmanager
def random_weights(step: int):
    """Make the step's loaders return random weights of the folder's configuration.

    Nothing is read or downloaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from dschat.models.dropout import set_config_dropout
    from dschat.models.reward_model import RewardModel

    def load(path, *, dtype, dropout=None, **_):
        config = AutoConfig.from_pretrained(path)
        if dropout is not None:
            set_config_dropout(config, dropout)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)

    def load_reward(path, *, dtype, dropout=None, **_):
        config = AutoConfig.from_pretrained(path, num_labels=1)
        if dropout is not None:
            set_config_dropout(config, dropout)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return RewardModel(AutoModelForSequenceClassification.from_config(config, dtype=dtype))

    if step == 3:
        from dschat.trainers import reference_model, rlhf_engine

        modules = [rlhf_engine, reference_model]
    else:
        from dschat.steps import reward, sft

        modules = [sft if step == 1 else reward]
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, function in (("load_causal_lm", load), ("load_reward_model", load_reward)):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, function))
        yield


@contextlib.contextmanager
def instrumented(meter, peaks: dict[str, int]):
    """Read the meter around every engine call, so that `peaks` holds the peak of each phase."""
    import transformers

    from dschat.engine.build import deepspeed

    def reading(function, label):
        def wrapped(*args, **kwargs):
            record(peaks, f"before {label}", meter)
            try:
                return function(*args, **kwargs)
            finally:
                record(peaks, label, meter)

        return wrapped

    targets = [
        (deepspeed, "initialize", "build"),
        (deepspeed.DeepSpeedEngine, "backward", "backward"),
        (deepspeed.DeepSpeedEngine, "step", "step"),
        (transformers.GenerationMixin, "generate", "generate"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, label in targets:
            stack.enter_context(
                mock.patch.object(owner, name, reading(getattr(owner, name), label))
            )
        yield


def record(peaks: dict[str, int], label: str, meter) -> None:
    """Read the meter and record the phase's peak and what is left after it."""
    peak, left = meter.read()
    peaks[label] = max(peaks.get(label, 0), peak)
    peaks[f"{label}, left"] = max(peaks.get(f"{label}, left", 0), left)


def load_main(step: int):
    """Import the main of a step as the module `main`, and return it."""
    if "main" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "main", ROOT / "training" / STEPS[step] / "main.py"
        )
        sys.modules["main"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["main"])
    return sys.modules["main"]


def run_main(step: int, argv: list[str]) -> None:
    """Run the main of a step in this process."""
    from dschat.runtime.log import set_up_logging

    set_up_logging()
    with mock.patch.object(sys, "argv", ["main.py", *argv]):
        load_main(step).main()
