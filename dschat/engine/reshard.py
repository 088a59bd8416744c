"""Load an engine's state on another number of ranks, through DeepSpeed's universal checkpoint.

Every ZeRO stage above 0 saves each rank's pieces. The universal form has one file for each
parameter and kind of state, from which each rank then takes its new piece.
"""

import argparse
import contextlib
import io
import logging
import shutil
from pathlib import Path

import torch
from deepspeed.checkpoint import ds_to_universal

from dschat.engine.optim import torch_optimizer
from dschat.runtime import dist
from dschat.runtime.log import logger


def load_engine_universally(engine, folder: Path, name: str, *, scratch: Path) -> None:
    """Load the state that another number of ranks saved to `folder`/`name`.

    All ranks must call it.

    Args:
        engine: the engine that takes the state.
        folder: the folder of the checkpoint's engines.
        name: the engine's folder in it.
        scratch: a folder that all ranks see, with room for another copy of the state. The copy is
            deleted at the end.

    Raises:
        ValueError: the conversion failed; raised on every rank.
    """
    logger.info(f"converting {folder / name} for {dist.world_size()} processes")
    fault = dist.first_fault(_convert(folder / name, scratch / name) if dist.is_main() else "")
    if fault:
        raise ValueError(
            f"{folder / name} cannot be converted for another number of processes: {fault}"
        )
    groups = _param_groups(engine)
    before = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    engine._config.load_universal_checkpoint = True
    try:
        path, _ = engine.load_checkpoint(str(scratch), tag=name)
        assert path is not None, f"{scratch}/{name} holds no engine"
    finally:
        engine._config.load_universal_checkpoint = False
    rates = engine.lr_scheduler.get_last_lr()
    for group, own, rate in zip(groups, before, rates, strict=True):
        # At stage 3 DeepSpeed (0.19.8) gives every group the rate and the decay of the first.
        group.update(own, lr=rate)
    for state in torch_optimizer(engine).state.values():
        # At stage 3 all parameters also share one step tensor, which each would increment.
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    dist.barrier()
    if dist.is_main():
        shutil.rmtree(scratch / name, ignore_errors=True)


def _convert(source: Path, target: Path) -> str:
    """Write the universal form of `source` to `target`, and return the fault or ""."""
    shutil.rmtree(target, ignore_errors=True)
    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    talk = io.StringIO()
    try:
        target.mkdir(parents=True)
        with contextlib.redirect_stdout(talk), contextlib.redirect_stderr(talk):
            ds_to_universal.main(options)
    except Exception as error:  # of any kind: the other ranks wait for this one's answer
        logging.getLogger(__name__).debug("converting %s", source, exc_info=True)
        return f"{type(error).__name__}: {error}"
    return ""


def _param_groups(engine) -> list[dict]:
    return torch_optimizer(engine).param_groups
