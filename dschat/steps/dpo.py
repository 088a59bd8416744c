"""DPO: train the SFT model on preference pairs directly, without a reward model."""

from collections.abc import Iterable
from functools import partial

from dschat.config.dpo import DPOConfig
from dschat.data.collate import collate_pairs
from dschat.data.loaders import GivenTables, build_pair_data, open_pair_rows
from dschat.models.causal_lm import load_causal_lm
from dschat.steps.loaders import run_loaders
from dschat.tracking.callbacks import Callback
from dschat.trainers.dpo import DPOObjective, build_reference
from dschat.trainers.supervised_run import save_run, start_run, train_run


def run_dpo(
    config: DPOConfig, *, given: GivenTables | None = None, callbacks: Iterable[Callback] = ()
) -> None:
    """Run DPO, and save the model to --output_dir.

    Args:
        config: of the run.
        given: rows in memory, see ``open_blends``.
        callbacks: called during the run.
    """
    open_rows = partial(open_pair_rows, config.data, given=given)
    run = start_run(config, number=2, open_rows=open_rows, callbacks=callbacks)
    config = run.config
    train_data, eval_data = build_pair_data(
        config.data, run.tokenizer, end_token_id=run.end_token_id, given=given
    )
    train_loader, eval_loader = run_loaders(
        run, train_data, eval_data, collate_pairs, packed_row=2 * config.data.max_seq_len
    )
    objective = DPOObjective(
        build_reference(run),
        beta=config.dpo.beta,
        label_smoothing=config.dpo.label_smoothing,
        loss_type=config.dpo.loss_type,
    )
    model = train_run(
        run,
        objective,
        load_model=load_causal_lm,
        train_loader=train_loader,
        eval_loader=eval_loader,
        eval_interval=config.run.eval_interval,
        print_loss=config.run.print_loss,
    )
    save_run(run, model)
