"""Step 1: supervised fine-tuning of a causal language model on demonstrations."""

from functools import partial

from dschat.config.parse import parse_config
from dschat.config.sft import SFTConfig
from dschat.runtime.log import run_main

if __name__ == "__main__":
    # Stop at a wrong flag or --help before the imports below, which take seconds.
    run_main(partial(parse_config, SFTConfig))

from dschat.data.collate import collate_text
from dschat.data.loaders import build_sft_data, make_loaders
from dschat.models.causal_lm import load_causal_lm
from dschat.trainers.preflight import dry_run
from dschat.trainers.supervised import SFTObjective
from dschat.trainers.supervised_run import save_run, start_run, train_run


def main() -> None:
    """Run step 1."""
    config = parse_config(SFTConfig)
    if config.run.dry_run:
        return dry_run(config)
    run = start_run(config, number=1)
    train_data, eval_data = build_sft_data(
        config.data, run.tokenizer, end_token_id=run.end_token_id
    )
    train_loader, eval_loader = make_loaders(
        train_data,
        eval_data,
        collate_text,
        pad_id=run.tokenizer.pad_token_id,
        train_batch_size=config.batch.per_device_train_batch_size,
        eval_batch_size=config.batch.per_device_eval_batch_size,
        window=config.schedule.gradient_accumulation_steps,
        seed=config.run.seed,
        tokens_per_batch=config.batch.tokens_per_batch,
        pack_to=config.data.max_seq_len if config.batch.packing else None,
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


if __name__ == "__main__":
    run_main(main)
