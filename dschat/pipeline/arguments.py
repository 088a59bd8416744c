"""Checks of the arguments of e2e_rlhf.py, and what its model names mean."""

import json
import os
import re
from pathlib import Path

from dschat.config.value_checks import at_least

# Sizes that are known by their number alone, DeepSpeed-Chat's way of naming OPT.
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
    several_hosts: bool = False,
) -> None:
    """Nothing where the run can start; makes the output folder.

    Args:
        num_processes: 0: as many as the deployment has.
        num_gpus: of this machine; None where others take part, whose GPUs it does not know.
        several_hosts: the deployment is multi_node.

    Raises:
        ValueError: it cannot; names every argument that is in the way.
    """
    found = at_least("--num-processes", num_processes, 0) + at_least(
        "--save-interval", save_interval, 0
    )
    if num_gpus and num_processes > num_gpus:
        found.append(
            f"--num-processes {num_processes}: this machine shows {num_gpus} GPU(s). Give as many at most."
        )
    if several_hosts and num_processes > 0:
        found.append(
            f"--num-processes {num_processes}: with multi_node the hostfile says how many. Leave it out."
        )
    if hostfile and not Path(hostfile).is_file():
        found.append(
            f'--hostfile {hostfile}: no such file. Give DeepSpeed\'s, with a line "HOST slots=8" for each node.'
        )
    elif hostfile and not several_hosts:
        found.append(
            f"--hostfile {hostfile}: hosts are for --deployment-type multi_node. Give that, or leave it out."
        )
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        fault = "" if os.access(output_dir, os.W_OK) else "Permission denied"
    except OSError as error:
        fault = error.strerror
    if fault:
        found.append(
            f"--output-dir {output_dir}: no folder that can be written ({fault}). Give another."
        )
    if found:
        raise ValueError("\n".join(found))


def resolve_model(name: str) -> tuple[str, str]:
    """What a model name on the command line means.

    Returns:
        kind ("demo", "tiny" or "real") and, for "tiny", the family, for "real" a hub id or the folder as given.

    Raises:
        ValueError: neither a known size, nor a folder or hub id by its looks.
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
        f"{name!r} is no known model: give one of {', '.join((*OPT_SIZES, *LLAMA2, *TINY))}, an existing folder or a hub "
        "id (owner/name)."
    )


def default_reward_model(actor: str) -> str:
    """What step 2 starts from where nothing is said: opt-350m beside an OPT actor, as in DeepSpeed-Chat, else the actor's own.

    In step 3 the critic starts from the reward model, and reads the actor's tokens.

    Args:
        actor: a hub id or a folder.
    """
    folder = Path(actor).expanduser()
    is_opt = re.search(r"(^|[-_/])opt-", actor.lower()) is not None
    if folder.is_dir():
        try:
            is_opt = (
                json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
                == "opt"
            )
        except (OSError, ValueError, LookupError, TypeError):  # step 1 says what is wrong with it
            is_opt = False
    return "facebook/opt-350m" if is_opt else actor


def size_name(name: str) -> str:
    """The folder name for a model below the output folder: its last path part, as a plain file name."""
    last = name.rstrip("/").split("/")[-1].removeprefix("opt-")
    return re.sub(r"[^A-Za-z0-9._-]", "_", last).strip(".") or "model"
