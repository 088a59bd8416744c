"""Setup and saving in steps 1, 2 and DPO; ``dschat.steps`` calls these functions in order."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dschat.checkpoint.run_checkpoint import Checkpoint
from dschat.checkpoint.run_state import RunState, find_checkpoint, saved_dtype
from dschat.checkpoint.save_model import save_model
from dschat.config.no_effect import announce
from dschat.config.parse import step_title
from dschat.engine.build import (
    build_training_engine,
    override,
    partitioned_loading,
    start_processes,
)
from dschat.engine.device import TORCH_DTYPES, on_cpu, resolve_dtype
from dschat.engine.ds_config import training_config
from dschat.engine.quantized import quantize_linears
from dschat.models.causal_lm import load_config
from dschat.models.dropout import disable_dropout
from dschat.models.lora import adapted_layer_names, log_lora
from dschat.models.packing import check_packing
from dschat.models.prepare import prepare_for_training
from dschat.models.routers import RouterWatch
from dschat.models.tokenizer import end_token_id, load_tokenizer
from dschat.runtime import dist
from dschat.runtime.log import logger
from dschat.runtime.seeds import seed_everything
from dschat.tracking.callbacks import Callback, Callbacks
from dschat.trainers.inputs import Check, model_checks, with_other_faults
from dschat.trainers.output_folder import (
    open_metrics,
    prepare_output_dir,
    record_run,
    write_pages,
)
from dschat.trainers.preflight import fitted, show_plan
from dschat.trainers.supervised import Objective, train_supervised


@dataclass(frozen=True)
class SupervisedRun:
    """A run of step 1, 2 or DPO, with process group and tokenizer but without a model."""

    number: int  # of the step
    config: Any  # SFTConfig, RewardConfig or DPOConfig
    device: torch.device
    dtype: str
    tokenizer: PreTrainedTokenizerBase
    end_token_id: int
    checkpoint: Checkpoint | None  # to resume from
    planned_memory_gib: dict[str, float] = field(default_factory=dict)  # see ``show_plan``
    callbacks: Callbacks = field(default_factory=Callbacks)


def start_run(
    config, *, number: int, open_rows: Check, callbacks: Iterable[Callback] = ()
) -> SupervisedRun:
    """Set up everything that a run needs before its data and its model.

    Joins the process group, checks the output folder, looks for a checkpoint, seeds, loads the
    tokenizer and logs the memory plan.

    Args:
        config: SFTConfig, RewardConfig or DPOConfig. That of the run differs with --fit auto.
        number: of the step.
        open_rows: opens the data; called only to tell its faults together with the model's.
        callbacks: called during the run.

    Raises:
        ValueError: the model or its tokenizer (the message then has the data's fault, too), the
            output folder or the checkpoint cannot be used, or the run
            does not fit the GPU.
    """
    device = start_processes(config.run.local_rank)
    config = fitted(config)
    announce(config)
    prepare_output_dir(config.run.output_dir, step=step_title(type(config)))
    checkpoint = find_checkpoint(config)
    seed_everything(config.run.seed)
    model = config.model
    try:
        tokenizer = load_tokenizer(
            model.model_name_or_path,
            add_eot_token=model.add_eot_token,
            eot_token=model.eot_token,
            trust_remote_code=model.trust_remote_code,
        )
        load_config(
            model.model_name_or_path,
            flag="--model_name_or_path",
            trust_remote_code=model.trust_remote_code,
        )
    except ValueError as error:
        raise with_other_faults(error, [*model_checks(model), open_rows]) from error
    end = end_token_id(tokenizer, add_eot_token=model.add_eot_token, eot_token=model.eot_token)
    dtype = resolve_dtype(model.dtype, saved=saved_dtype(checkpoint))
    planned = show_plan(config, dtype=dtype)
    return SupervisedRun(
        number,
        config,
        device,
        dtype,
        tokenizer,
        end,
        checkpoint,
        planned,
        Callbacks(callbacks),
    )


def train_run(
    run: SupervisedRun,
    objective: Objective,
    *,
    load_model,
    train_loader,
    eval_loader,
    eval_interval: int = 0,
    print_loss: bool = False,
) -> torch.nn.Module:
    """Load the model, train it and return it, with LoRA adapters and in its ZeRO partitions.

    Args:
        run: from ``start_run``.
        objective: the loss and the evaluation.
        load_model: ``load_causal_lm`` or ``load_reward_model``.
        train_loader: training rows of this rank.
        eval_loader: held-out rows of this rank.
        eval_interval: updates between evaluations; 0: evaluate after every epoch.
        print_loss: log the loss of every update.
    """
    config = run.config
    schedule = config.schedule
    options = config.run
    tokens_per_batch = config.batch.tokens_per_batch
    # With --tokens_per_batch the loader gives the rows of a whole update at once.
    window = 1 if tokens_per_batch else schedule.gradient_accumulation_steps
    epoch_steps = len(train_loader) // window
    total_steps = schedule.max_train_steps or epoch_steps * schedule.num_train_epochs
    tensorboard = options.tensorboard_path if options.enable_tensorboard else None
    engine = build_engine(run, load_model, total_steps=total_steps, tensorboard=tensorboard)
    if config.batch.packing:
        check_packing(engine, engine.module, path=config.model.model_name_or_path)
    coef = config.optim.router_aux_loss_coef
    routers = RouterWatch(engine.module, coef=coef) if coef else None
    done = run.checkpoint.step if run.checkpoint else None
    metrics = open_metrics(config, number=run.number, resume_from=done)
    record_run(
        config,
        options.output_dir,
        dtype=run.dtype,
        text_format=train_loader.dataset.text_format,
        total_steps=total_steps,
        resumed_from=done,
        planned_memory_gib=run.planned_memory_gib,
    )
    state = RunState(
        config,
        loader=train_loader,
        window=window,
        engines={"model": engine},
        metrics=metrics,
        callbacks=run.callbacks,
    )
    state.facts = {"dtype": run.dtype}
    if config.data.streaming:
        state.parts["stream"] = train_loader
    state.restore(run.checkpoint)
    train_supervised(
        engine,
        objective,
        state,
        eval_loader=eval_loader,
        num_eval_rows=len(eval_loader.dataset),
        routers=routers,
        total_steps=total_steps,
        metrics=metrics,
        eval_interval=eval_interval,
        log_interval_s=options.log_interval_s,
        print_loss=print_loss,
        tokens_per_batch=tokens_per_batch,
    )
    metrics.close()
    return engine.module


def save_run(run: SupervisedRun, model: torch.nn.Module, tokenizer=None) -> None:
    """Save the model to --output_dir, next to metrics.jsonl, run.json and a report.

    All ranks must call it.

    Args:
        run: from ``start_run``.
        model: from ``train_run``; of a reward model the transformers model inside it.
        tokenizer: saved with the model; default: the run's.
    """
    if run.config.run.output_dir is not None:
        save_model(model, tokenizer or run.tokenizer, Path(run.config.run.output_dir))
        write_pages(run.config.run.output_dir)
        run.callbacks.on_save(Path(run.config.run.output_dir))


def build_engine(
    run: SupervisedRun, load_model, *, total_steps: int, tensorboard: str | None = None
):
    """Load the model and build its DeepSpeed engine.

    Args:
        run: from ``start_run``.
        load_model: ``load_causal_lm`` or ``load_reward_model``.
        total_steps: updates of the run, the length of the learning-rate schedule.
        tensorboard: folder of DeepSpeed's events; None: no events.
    """
    config = run.config
    rows, steps = config.batch.layout(config.schedule.gradient_accumulation_steps)
    ds_config = training_config(
        config.system,
        dtype=run.dtype,
        micro_batch_size=rows,
        gradient_accumulation_steps=steps,
        world_size=dist.world_size(),
        on_cpu=on_cpu(),
        tensorboard_path=tensorboard,
        tensorboard_name=f"step{run.number}_model",
        ranks_per_node=dist.ranks_per_node(),
    )
    ds_config = override(ds_config, *config.run.deepspeed_file)
    model = load_start(run, load_model, ds_config, dropout=config.system.dropout)
    lora_names = prepare_for_training(model, lora=config.lora, system=config.system)
    log_lora(model, chosen=config.lora.chooses_layers)
    kind = config.system.frozen_format
    if kind != "none":
        quantize_linears(model, adapted_layer_names(model), kind)
    return build_training_engine(
        model,
        ds_config=ds_config,
        schedule=config.schedule,
        total_steps=total_steps,
        learning_rate=config.optim.learning_rate,
        weight_decay=config.optim.weight_decay,
        lora_names=lora_names,
        lora_learning_rate=config.lora.lora_learning_rate,
        compile_layers=config.system.compile_layers
        and kind == "none"
        and not config.optim.router_aux_loss_coef,
    )


def load_start(
    run: SupervisedRun, load_model, ds_config: dict, *, dropout: float | None
) -> torch.nn.Module:
    """Load the initial model for an engine of `ds_config`; under ZeRO-3 it is partitioned.

    Args:
        run: from ``start_run``.
        load_model: ``load_causal_lm`` or ``load_reward_model``.
        ds_config: the DeepSpeed configuration.
        dropout: every dropout probability; None: that of the model's configuration.
    """
    model = run.config.model
    logger.info(f"loading {model.model_name_or_path} in {run.dtype} on {run.device}")
    with partitioned_loading(ds_config):
        loaded = load_model(
            model.model_name_or_path,
            dtype=TORCH_DTYPES[run.dtype],
            tokenizer=run.tokenizer,
            dropout=dropout,
            trust_remote_code=model.trust_remote_code,
        )
    if dropout == 0.0:
        disable_dropout(loaded)
    return loaded
