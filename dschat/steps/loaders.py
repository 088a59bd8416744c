"""The loaders of steps 1, 2 and DPO."""

from collections.abc import Callable

from torch.utils.data import DataLoader

from dschat.data.datasets import TextDataset
from dschat.data.loaders import make_loaders
from dschat.data.streams import StreamLoader
from dschat.trainers.supervised_run import SupervisedRun


def run_loaders(
    run: SupervisedRun,
    train_data: TextDataset,
    eval_data: TextDataset,
    collate: Callable,
    *,
    packed_row: int,
) -> tuple[DataLoader | StreamLoader, DataLoader]:
    """Build this rank's loaders of a run; see ``make_loaders``.

    Args:
        run: of step 1, 2 or DPO.
        train_data: training rows.
        eval_data: held-out rows.
        collate: ``collate_text`` or ``collate_pairs``.
        packed_row: tokens of a training row with --packing.
    """
    config = run.config
    return make_loaders(
        train_data,
        eval_data,
        collate,
        pad_id=run.tokenizer.pad_token_id,
        train_batch_size=config.batch.per_device_train_batch_size,
        eval_batch_size=config.batch.per_device_eval_batch_size,
        window=config.schedule.gradient_accumulation_steps,
        seed=config.run.seed,
        eval_iters=config.run.eval_iters,
        tokens_per_batch=config.batch.tokens_per_batch,
        pack_to=packed_row if config.batch.packing else None,
    )
