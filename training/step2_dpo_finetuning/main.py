"""DPO: train the SFT model on preference pairs directly, without a reward model."""

from functools import partial

from dschat.config.dpo import DPOConfig
from dschat.config.parse import parse_config
from dschat.runtime.log import run_main

if __name__ == "__main__":
    # Stop at a wrong flag or --help before the imports below, which take seconds.
    run_main(partial(parse_config, DPOConfig))

from dschat.data.collate import collate_pairs
from dschat.data.loaders import build_pair_data, make_loaders
from dschat.models.causal_lm import load_causal_lm
from dschat.trainers.dpo import DPOObjective, build_reference
from dschat.trainers.preflight import dry_run
from dschat.trainers.supervised_run import save_run, start_run, train_run


def main() -> None:
    """Run DPO."""
    config = parse_config(DPOConfig)
    if config.run.dry_run:
        return dry_run(config)
    run = start_run(config, number=2)
    train_data, eval_data = build_pair_data(
        config.data, run.tokenizer, end_token_id=run.end_token_id
    )
    train_loader, eval_loader = make_loaders(
        train_data,
        eval_data,
        collate_pairs,
        pad_id=run.tokenizer.pad_token_id,
        train_batch_size=config.batch.per_device_train_batch_size,
        eval_batch_size=config.batch.per_device_eval_batch_size,
        window=config.schedule.gradient_accumulation_steps,
        seed=config.run.seed,
        tokens_per_batch=config.batch.tokens_per_batch,
        pack_to=2 * config.data.max_seq_len if config.batch.packing else None,
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


if __name__ == "__main__":
    run_main(main)
