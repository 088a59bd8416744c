"""What every main does before and after training: messages about flags, seeds, folders, the record of the run."""

import glob
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path

import torch

from dschat.config.parse import config_dict, step_title
from dschat.config.ppo_options import MODEL_FOLDERS
from dschat.models.export import files_of_a_model, mend_folder
from dschat.tracking import dist
from dschat.tracking.lock import lock_folder
from dschat.tracking.log import logger
from dschat.tracking.report import hardware, versions, write_json

# Flags that change nothing, and why: said once at the start of a run that gives one of them.
WITHOUT_EFFECT = {
    "compute_fp32_loss": "logprobs and losses are always computed in fp32",
    "align_overflow": "engines always step together or not at all",
    "deepspeed": "every run is a DeepSpeed run",
    "deepscale": "every run is a DeepSpeed run",
    "preprocessing_num_workers": "rows are tokenised as they are read",
    "actor_dropout": "dropout is off in all four models of step 3",
    "critic_dropout": "dropout is off in all four models of step 3",
}
RECORD = "run.json"  # in every output folder, from the moment that a run has loaded its models


def announce(config) -> None:
    """Log the given flags that have no effect."""
    given = config_dict(config)
    for name, reason in WITHOUT_EFFECT.items():
        if given.get(name):
            logger.info(f"--{name} has no effect: {reason}")
    if given.get("num_padding_at_beginning", 1) != 1:
        logger.info("--num_padding_at_beginning has no effect: positions come from the attention mask")
    for name in ("zero_stage", "actor_zero_stage", "critic_zero_stage"):
        if given.get(name) == 0 and given["dtype"] != "fp32":
            logger.info(f"--{name} 0 in half precision runs as stage 1, with the same result")
    if not given.get("enable_hybrid_engine"):
        for name, default in (("unpin_actor_parameters", False), ("release_inference_cache", False), ("inference_tp_size", 1)):
            if given.get(name, default) != default:
                logger.warning(f"--{name} has no effect without --enable_hybrid_engine")
    _announce_memory(config, given)
    if given.get("inference_tp_size", 1) == 1 and given.get("tp_gather_partition_size", 8) != 8:
        logger.info("--tp_gather_partition_size has no effect with --inference_tp_size 1")
    if given.get("top_k") or given.get("top_p", 1.0) < 1.0 or given.get("min_answer_len"):
        logger.warning(
            "--top_k, --top_p and --min_answer_len change what is sampled but not the logprobs: ratio and KL are biased"
        )
    if given.get("critic_warmup_steps") and given.get("advantage_estimator") != "gae":
        logger.warning("--critic_warmup_steps has no effect: this --advantage_estimator has no critic")
    if given.get("target_kl") is not None and config.updates_per_rollout == 1:
        logger.warning("--target_kl has no effect: each rollout has one update, and no others that could be left out")
    if given.get("kl_target") is not None and not given["kl_coef"]:
        logger.warning("--kl_target has no effect: it multiplies --kl_coef, which is 0 and stays so")
    if given.get("enable_test_mode") and not given.get("test_stop_step"):
        logger.warning("--enable_test_mode has no effect without --test_stop_step")
    if given["output_dir"] is None:
        logger.info("--output_dir is not given: the trained model will not be saved")


def _announce_memory(config, given: dict) -> None:
    """Log which of the given memory flags have no effect, and what int8 weights mean for the result."""
    if given.get("offload_reference_model") and config.shares_reference:
        logger.info("--offload_reference_model has no effect: the reference is the trained model with its adapters off")
    if given.get("offload_reward_model") and config.shares_reward:
        logger.info("--offload_reward_model has no effect on the critic's model, which the critic stands in for")
    if given.get("offload_idle_states") and given["offload"]:
        logger.info("--offload_idle_states has no effect: with --offload the states are in host memory anyway")
    if not given["pin_memory"] and not any(value for name, value in given.items() if name.startswith("offload")):
        logger.info("--no_pin_memory has no effect: nothing is offloaded")
    if given.get("enable_mixed_precision_lora"):
        logger.info("--enable_mixed_precision_lora: adapted weights are rounded to int8, and are saved as rounded")


def seed_everything(seed: int) -> None:
    """Seed Python and torch; processes draw differently, but weights made from scratch must not."""
    random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> tuple[dict[str, torch.Tensor], dict]:
    """The states of Python's and torch's generators: tensors, and the rest as JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {"python": random.getstate()}


def set_random_state(tensors: dict[str, torch.Tensor], state: dict) -> None:
    """Become what ``random_state`` was taken of."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def prepare_output_dir(output_dir: str | None, *, step: str, below: Iterable[str] = ()) -> None:
    """Make the output folder, see that it can be written, and keep other runs from it until this process ends.

    What a run that was killed left half done beside it is put in order. Every process must call it.

    Args:
        step: the title of this step.
        below: folders in it that models will be saved to; none: it is itself the model's.

    Raises:
        ValueError: it cannot be written, holds a model that no run of this step wrote, or another run writes to it; names
            --output_dir.
    """
    if output_dir is None:
        return
    path = Path(output_dir).resolve()
    if path == Path.cwd():
        raise ValueError(
            f"--output_dir {output_dir}: this is the folder you are in, and a finished model takes the place of its folder. "
            "Give one below it."
        )
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except OSError as error:  # a name that is too long, say
        raise ValueError(f"--output_dir {output_dir}: not writable ({error.strerror}). Give another folder.") from error
    if path.is_mount() or (path.exists() and not os.access(path.parent, os.W_OK)):
        raise ValueError(
            f"--output_dir {output_dir}: a finished model takes its name by a rename, which a mount point or a folder "
            "above that is not writable forbids. Give a folder below it."
        )
    fault = dist.first_fault(_taken(path, step, below) if dist.is_main() else "")
    if fault:
        raise ValueError(f"--output_dir {output_dir}: {fault}. Give another folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.{dist.rank()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir}: not writable ({error.strerror}). Give another folder.") from error


def _other_model(path: Path, step: str, below: Iterable[str]) -> str:
    """Why no model may be saved there, or "": one lies there already that is not of a run of this step."""
    if _asides(path):  # an output folder that was being replaced, and is put in order later
        return ""
    if not (path / RECORD).exists():
        for folder in (path, *(path / name for name in below)):
            names = files_of_a_model(folder)
            if names:
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                return f"{folder} holds a model that no run here has written ({shown}), and this run would replace it or its files"
    elif files_of_a_model(path):
        try:
            other = json.loads((path / RECORD).read_text(encoding="utf-8")).get("step", step)
        except (ValueError, AttributeError):  # no JSON, or no object
            return f"{RECORD} in it is damaged, and tells no longer whose model it holds"
        if other != step:
            return f'it holds the model of "{other}", and a run of "{step}" would replace it or its {RECORD}'
    return ""


def _asides(path: Path) -> list[Path]:
    """What the folder was a moment ago, where a run was killed as it replaced it."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.old/{glob.escape(path.name)}"))


def _taken(path: Path, step: str, below: Iterable[str]) -> str:
    """Take the folder for this run and put it in order; returns why that cannot be, or ""."""
    try:
        fault = _other_model(path, step, below)
        if fault:
            return fault
        # A run that is alive holds the folder, or what was it a moment ago.
        for folder in [*([path] if path.is_dir() else []), *_asides(path)]:
            lock_folder(folder)
        for folder in (path, *(path / name for name in MODEL_FOLDERS)):
            mend_folder(folder)
        path.mkdir(parents=True, exist_ok=True)
        lock_folder(path)
    except BlockingIOError as error:
        return str(error)
    except OSError as error:
        return f"not writable ({error.strerror})"
    return ""


def record_run(config, output_dir: str | None, *, dtype: str, **facts) -> None:
    """Write run.json: the configuration, precision, processes, hardware and versions of this run."""
    if output_dir is None or not dist.is_main():
        return
    record = {
        "step": step_title(type(config)),
        "config": config_dict(config),
        "dtype": dtype,
        "processes": dist.world_size(),
        "hardware": hardware(),
        "versions": versions(),
        **facts,
    }
    write_json(Path(output_dir) / RECORD, record)
