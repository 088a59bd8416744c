"""DeepSpeed's launcher, as a command."""

import os
import re
import sys


def launcher_command(
    *, port: int, processes: int, on_gpu: bool, several_hosts: bool, hostfile: str | None
) -> list[str]:
    """What stands in front of a main.

    Args:
        port: MASTER_PORT.
        processes: on this machine; 0: as many as there are devices, or as the hostfile says.
        several_hosts: those of `hostfile`, or of DeepSpeed's own default file.

    Raises:
        ValueError: the launcher cannot take the GPUs that CUDA_VISIBLE_DEVICES names.
    """
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(port)]
    if several_hosts:
        return words + (["--hostfile", hostfile] if hostfile else [])
    words += [
        "--hostfile",
        "",
    ]  # else it takes /job/hostfile, where there is one, and with it other machines
    if not processes:
        return words
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not on_gpu:
        return words + ["--num_accelerators", str(processes)]
    if not visible:
        return words + ["--num_gpus", str(processes)]
    chosen = ",".join(visible.split(",")[:processes])
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", chosen):
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={visible}: DeepSpeed's launcher knows GPUs by their numbers alone. Give numbers, or start "
            "the mains by torchrun."
        )
    # With --num_gpus it would take others.
    return words + ["--include", f"localhost:{chosen}"]
