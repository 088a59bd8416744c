"""Step 1: supervised fine-tuning of a causal language model on demonstrations."""

from collections.abc import Iterable
from functools import partial

from dschat.config.sft import SFTConfig
from dschat.data.collate import collate_text
from dschat.data.loaders import GivenTables, build_sft_data, open_sft_rows
from dschat.models.causal_lm import load_causal_lm
from dschat.steps.loaders import run_loaders
from dschat.tracking.callbacks import Callback
from dschat.trainers.supervised import SFTObjective
from dschat.trainers.supervised_run import save_run, start_run, train_run


def run_sft(
    config: SFTConfig, *, given: GivenTables | None = None, callbacks: Iterable[Callback] = ()
) -> None:
    """Run step 1, and save the model to --output_dir.

    Args:
        config: of the run.
        given: rows in memory, see ``open_blends``.
        callbacks: called during the run.
    """
    open_rows = partial(open_sft_rows, config.data, given=given)
    run = start_run(config, number=1, open_rows=open_rows, callbacks=callbacks)
    config = run.config
    train_data, eval_data = build_sft_data(
        config.data, run.tokenizer, end_token_id=run.end_token_id, given=given
    )
    train_loader, eval_loader = run_loaders(
        run, train_data, eval_data, collate_text, packed_row=config.data.max_seq_len
    )
    model = train_run(
        run,
        SFTObjective(),
        load_model=load_causal_lm,
        train_loader=train_loader,
        eval_loader=eval_loader,
        print_loss=config.run.print_loss,
    )
    save_run(run, model)
