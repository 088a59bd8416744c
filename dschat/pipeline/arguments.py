"""Checks of the arguments of e2e_rlhf.py, and the models that its short names stand for."""

import json
import os
import re
from pathlib import Path

from dschat.config.value_checks import at_least

# OPT models are named by their size alone, as in DeepSpeed-Chat.
OPT_SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
LLAMA2 = {f"llama-2-{size}": f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b")}
TINY = ("tiny-llama", "tiny-opt", "tiny-gpt2", "tiny-gpt_neox", "tiny-qwen2", "tiny-mistral")


def check_arguments(
    output_dir: str,
    *,
    num_processes: int,
    num_gpus: int | None,
    save_interval: int,
    hostfile: str | None,
    max_restarts: int = 0,
    several_hosts: bool = False,
) -> None:
    """Check that the run can start, and make the output folder.

    Args:
        output_dir: the output folder.
        num_processes: ranks on this machine; 0: as many as the deployment has.
        num_gpus: GPUs of this machine; None if the run spans several machines.
        save_interval: updates between two checkpoints; 0: no checkpoints at intervals.
        hostfile: DeepSpeed's hostfile, if any.
        max_restarts: restarts of each step after faults.
        several_hosts: whether the deployment is multi_node.

    Raises:
        ValueError: the run cannot start. The message names every argument at fault.
    """
    found = at_least("--num-processes", num_processes, 0)
    found += at_least("--save-interval", save_interval, 0)
    found += at_least("--max-restarts", max_restarts, 0)
    if max_restarts > 0 and not save_interval:
        found.append(f"--max-restarts {max_restarts} needs --save-interval: give both.")
    if num_gpus and num_processes > num_gpus:
        found.append(
            f"--num-processes {num_processes}: this machine has {num_gpus} GPU(s). "
            "Give at most that many."
        )
    if several_hosts and num_processes > 0:
        found.append(
            f"--num-processes {num_processes}: with multi_node the hostfile sets the number of "
            "processes. Leave the flag out."
        )
    if hostfile and not Path(hostfile).is_file():
        found.append(
            f"--hostfile {hostfile}: no such file. Give a DeepSpeed hostfile, with a line "
            '"HOST slots=8" for each node.'
        )
    elif hostfile and not several_hosts:
        found.append(
            f"--hostfile {hostfile}: a hostfile needs --deployment-type multi_node. Give that, or "
            "leave the hostfile out."
        )
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        fault = "" if os.access(output_dir, os.W_OK) else "Permission denied"
    except OSError as error:
        fault = error.strerror
    if fault:
        found.append(f"--output-dir {output_dir}: not a writable folder ({fault}). Give another.")
    if found:
        raise ValueError("\n".join(found))


def resolve_model(name: str) -> tuple[str, str]:
    """Resolve a model name of the command line.

    Returns:
        The kind ("demo", "tiny" or "real"), and a name: the family of a tiny model, the hub id or
        the unchanged folder of a real one.

    Raises:
        ValueError: the name is no known size and does not look like a folder or hub id.
    """
    if name in ("", "smollm2", "smollm2-135m"):
        return "demo", "smollm2-135m"
    if name in TINY:
        return "tiny", name.removeprefix("tiny-")
    short = name.lower().removeprefix("facebook/").removeprefix("opt-")
    if short in OPT_SIZES:
        return "real", f"facebook/opt-{short}"
    if name.lower() in LLAMA2:
        return "real", LLAMA2[name.lower()]
    if "/" in name or name.startswith((".", "~")) or Path(name).is_dir():
        return "real", name
    raise ValueError(
        f"{name!r} is no known model. Give one of {', '.join((*OPT_SIZES, *LLAMA2, *TINY))}, "
        "an existing folder or a hub id (owner/name)."
    )


def default_reward_model(actor: str) -> str:
    """Return the model that step 2 starts from by default.

    This is opt-350m for an OPT actor, as in DeepSpeed-Chat, else the actor's own model: in step 3
    the critic starts from the reward model and has to read the actor's tokens.

    Args:
        actor: a hub id or a folder.
    """
    folder = Path(actor).expanduser()
    is_opt = re.search(r"(^|[-_/])opt-", actor.lower()) is not None
    if folder.is_dir():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            is_opt = config["model_type"] == "opt"
        except (OSError, ValueError, LookupError, TypeError):  # step 1 reports what is wrong
            is_opt = False
    return "facebook/opt-350m" if is_opt else actor


def size_name(name: str) -> str:
    """Return a model's folder name in the output folder: its last path part, as a file name."""
    last = name.rstrip("/").split("/")[-1].removeprefix("opt-")
    return re.sub(r"[^A-Za-z0-9._-]", "_", last).strip(".") or "model"
