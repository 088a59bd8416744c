"""The command line of DeepSpeed's launcher."""

import os
import re
import sys


def launcher_command(
    *, port: int, processes: int, on_gpu: bool, several_hosts: bool, hostfile: str | None
) -> list[str]:
    """Return the command that starts a main; the main and its flags follow it.

    Args:
        port: MASTER_PORT.
        processes: ranks on this machine; 0: one for each device, or as the hostfile says.
        on_gpu: whether the ranks run on GPUs.
        several_hosts: whether to start on the hosts of `hostfile`.
        hostfile: the hostfile; None: DeepSpeed's default file.

    Raises:
        ValueError: the launcher cannot select the GPUs that CUDA_VISIBLE_DEVICES names.
    """
    words = [sys.executable, "-m", "dschat.engine.deepspeed_runner", "--master_port", str(port)]
    if several_hosts:
        return words + (["--hostfile", hostfile] if hostfile else [])
    # Without an empty hostfile DeepSpeed reads /job/hostfile, if it exists, and starts on the
    # machines that it names.
    words += ["--hostfile", ""]
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
            f"CUDA_VISIBLE_DEVICES={visible}: DeepSpeed's launcher knows GPUs by their numbers "
            "only. Give numbers, or start the mains with torchrun."
        )
    # --num_gpus would ignore CUDA_VISIBLE_DEVICES and take the first GPUs.
    return words + ["--include", f"localhost:{chosen}"]
