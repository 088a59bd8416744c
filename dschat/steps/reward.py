"""Step 2: train a reward model on preference pairs."""

from collections.abc import Iterable
from functools import partial

from dschat.config.reward import RewardConfig
from dschat.data.collate import collate_pairs
from dschat.data.loaders import (
    GivenTables,
    build_pair_data,
    open_pair_rows,
)
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import ensure_unambiguous_pad
from dschat.steps.loaders import run_loaders
from dschat.tracking.callbacks import Callback
from dschat.trainers.supervised import RewardObjective
from dschat.trainers.supervised_run import save_run, start_run, train_run


def run_reward(
    config: RewardConfig, *, given: GivenTables | None = None, callbacks: Iterable[Callback] = ()
) -> None:
    """Run step 2, and save the model to --output_dir.

    Args:
        config: of the run.
        given: rows in memory, see ``open_blends``.
        callbacks: called during the run.
    """
    open_rows = partial(open_pair_rows, config.data, given=given)
    run = start_run(config, number=2, open_rows=open_rows, callbacks=callbacks)
    config = run.config
    # The saved model finds the last token by the pad id, so no text may contain the pad token.
    ensure_unambiguous_pad(run.tokenizer)
    train_data, eval_data = build_pair_data(
        config.data,
        run.tokenizer,
        end_token_id=run.end_token_id,
        cut_fraction=config.data.cut_fraction,
        seed=config.run.seed,
        given=given,
    )
    train_loader, eval_loader = run_loaders(
        run, train_data, eval_data, collate_pairs, packed_row=2 * config.data.max_seq_len
    )
    model = train_run(
        run,
        RewardObjective(center_rewards_coef=config.loss.center_rewards_coef),
        load_model=load_reward_model,
        train_loader=train_loader,
        eval_loader=eval_loader,
        eval_interval=config.run.eval_interval,
    )
    save_run(run, model.model)
