"""Option groups that the steps share.

Each group is a frozen dataclass; the configuration of a step is a set of groups. A field is a
command-line flag of the same name, and a key of a YAML or JSON file. Names and defaults follow
DeepSpeed-Chat; docs/differences_from_deepspeed_chat.md explains those that differ.
"""

import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

from dschat.config.value_checks import fields_at_least, seed_value
from dschat.runtime import supervisor

Dtype = Literal["auto", "fp16", "bf16", "fp32"]
FrozenFormat = Literal["none", "int8", "nf4"]
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]
PromptFormat = Literal["auto", "plain", "human_assistant", "chat"]
Truncation = Literal["keep_prompt", "share", "drop"]
PairRule = Literal["best_worst", "all", "adjacent"]
TrainOn = Literal["all_assistant", "last", "all"]

# Loggers of --report_to, and the package that each needs.
LOGGER_PACKAGES = {
    "tensorboard": "tensorboard",
    "csv": "csv",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
}


def flag(default: Any, help_text: str) -> Any:
    """Return a dataclass field with a help text; a list gets a factory."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help_text})
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class DataOptions:
    """The data sets, their split and their text format."""

    _argument_group_name = "data"

    data_path: list[str] = flag(
        ["Dahoas/rm-static"],
        "Data sets, blended: local .json/.jsonl/.csv/.tsv/.parquet/.arrow files (text also as .gz "
        "or .zst), patterns such as 'rows/*.jsonl', folders with train.* and eval.* or with "
        "numbered files, folders of datasets.save_to_disk, or hub names. name:config@split names "
        "a configuration and the part to train on.",
    )
    data_split: str = flag(
        "2,4,4", "Shares of the data for steps 1, 2 and 3; disjoint, and the same in every step."
    )
    data_output_path: Optional[str] = flag(
        None, "Cache folder for data sets. Default: the user's cache folder."
    )
    data_seed: int = flag(1234, "Seed of the split, which therefore does not depend on --seed.")
    eval_fraction: float = flag(0.1, "Share held out from a source without an evaluation split.")
    prompt_format: PromptFormat = flag(
        "auto",
        "Text format of rows: plain (prompt + answer, unchanged), human_assistant, chat (the "
        "tokenizer's chat template), or auto (messages: the chat template if the tokenizer has "
        "one, else human_assistant; other rows: plain).",
    )
    truncation: Truncation = flag(
        "keep_prompt",
        "Rows over the length limit: keep_prompt (cut the end of the answer; leave out a row whose "
        "prompt leaves no room for one), share (prompt and answer each keep at least half; the "
        "prompt loses its beginning), or drop (leave them out). All are counted in the log.",
    )
    skip_bad_rows: bool = flag(
        False, "Skip and count malformed rows instead of stopping with an error."
    )
    dataset_config: Optional[str] = flag(
        None, "Configuration of hub data sets whose entry names none (name:config@split)."
    )
    dataset_split: Optional[str] = flag(
        None,
        "Part to train on of data sets whose entry names none, such as train_prefs; for hub names "
        "also a slice: train[:10%%]. Default: train, or else the part for the step (step 1: "
        "train_sft or train_gen; step 2 and DPO: train_prefs; step 3: train_gen, train_prefs or "
        "train_sft).",
    )
    prompt_key: Optional[str] = flag(None, "Column of the prompt; info.post is a nested field.")
    response_key: Optional[str] = flag(None, "Column of the answer that step 1 learns.")
    chosen_key: Optional[str] = flag(None, "Column of the better answer.")
    rejected_key: Optional[str] = flag(None, "Column of the worse answer.")
    messages_key: Optional[str] = flag(None, "Column of the conversation.")
    system_key: Optional[str] = flag(None, "Column of the system prompt.")
    label_key: Optional[str] = flag(
        None, "Column that says whether an answer is good (true) or bad (false)."
    )
    pairs: PairRule = flag(
        "best_worst", "Pairs of step 2 from ranked answers: best_worst, all, or adjacent."
    )
    min_margin: float = flag(
        0.0, "Leave out pairs of step 2 whose margin or difference of scores is smaller."
    )
    blend: list[float] = flag(
        [], "Share of each data set in an epoch, in the order of the data sets; empty: its rows."
    )
    blend_temperature: float = flag(
        1.0, "Above 1, small data sets are drawn more often: shares ** (1 / temperature)."
    )


@dataclass(frozen=True)
class TextOptions(DataOptions):
    """The data of a step that trains on whole texts."""

    max_seq_len: int = flag(512, "Longest text in tokens; see --truncation.")
    streaming: bool = flag(
        False,
        "Read and tokenize the rows while training, for data sets larger than the disk; needs "
        "--max_train_steps.",
    )
    shuffle_buffer: int = flag(
        10_000, "Rows that --streaming keeps in memory and shuffles, over all ranks."
    )


@dataclass(frozen=True)
class ModelOptions:
    """Loading of models and tokenizers."""

    _argument_group_name = "model"

    dtype: Dtype = flag(
        "auto",
        "Training precision; auto: bf16 if the GPU supports it, else fp16; on a CPU bf16 if it has "
        "instructions for it (AMX, AVX-512-BF16, Arm's), else fp32.",
    )
    add_eot_token: bool = flag(
        False, "Add --eot_token as a special token and end every answer with it."
    )
    eot_token: str = flag("<|endoftext|>", "The end-of-text token that --add_eot_token adds.")
    trust_remote_code: bool = flag(False, "Run Python code from a model folder or hub repository.")


@dataclass(frozen=True)
class ScheduleOptions:
    """Length of training and its learning-rate schedule."""

    _argument_group_name = "schedule"

    num_train_epochs: int = flag(1, "Passes over the training data.")
    max_train_steps: int = flag(
        0, "Stop after this many optimizer steps (step 3: rollouts); 0: whole epochs."
    )
    lr_scheduler_type: Scheduler = flag("cosine", "Learning-rate schedule of transformers.")
    num_warmup_steps: int = flag(0, "Optimizer steps of linear warm-up.")
    warmup_ratio: Optional[float] = flag(
        None,
        "Instead of --num_warmup_steps: share of the run's optimizer steps (step 3: of each "
        "model's) that warm up, rounded down.",
    )
    gradient_accumulation_steps: int = flag(1, "Micro-batches per optimizer step.")

    def warmup_updates(self, total: int) -> int:
        """Return how many of a run's `total` updates warm up."""
        if self.warmup_ratio is None:
            return min(self.num_warmup_steps, total)
        return int(self.warmup_ratio * total + 1e-6)  # 0.29 * 100 is 28.999... in floats


@dataclass(frozen=True)
class RunOptions:
    """Output, checkpoints, logging and launcher flags of a run."""

    _argument_group_name = "run"

    output_dir: Optional[str] = flag(None, "Folder for the model, metrics.jsonl and run.json.")
    seed: int = flag(1234, "Seed of initialization, data order and sampling.")
    save_interval: int = flag(
        0,
        "Save a checkpoint every so many optimizer steps (step 3: rollouts); 0: only when the run "
        "is stopped.",
    )
    save_total_limit: int = flag(
        2, "Keep this many checkpoints and delete older ones; 0: keep all."
    )
    background_save: bool = flag(
        False,
        "Copy a checkpoint to host memory and write it while training continues. Each rank keeps "
        "memory for one copy of its part of the checkpoint.",
    )
    resume: Optional[str] = flag(
        None,
        "Resume from a checkpoint: its folder, or latest (the newest complete one in --output_dir; "
        "if there is none, the run starts from the beginning).",
    )
    max_restarts: int = flag(
        0,
        "Start the run again from its newest checkpoint, up to so many times, after a crash, a "
        "kill, a hang or a lack of memory. Needs --save_interval, and a launcher of dschat (the "
        "launch scripts, e2e_rlhf.py, dschat.engine.deepspeed_runner) or python -m "
        "dschat.supervise before the command.",
    )
    hang_timeout_s: float = flag(
        supervisor.DEFAULT_HANG_TIMEOUT_S,
        "With --max_restarts: seconds without an update (step 3: a rollout), after which a run "
        "hangs. They must be enough for loading, an evaluation and saving the model, too.",
    )
    restart_delay_s: float = flag(
        supervisor.DEFAULT_RESTART_DELAY_S,
        "With --max_restarts: seconds before a restart; twice as many if the run made no progress "
        "since the restart before.",
    )
    log_interval_s: float = flag(5.0, "Seconds between progress lines.")
    enable_tensorboard: bool = flag(
        False, "Write TensorBoard events of the run and of each engine."
    )
    report_to: list[str] = flag(
        [],
        "Send the metrics to these, too: tensorboard, csv (metrics.csv), wandb, trackio, mlflow. "
        "Separate them by commas or spaces. Default: metrics.jsonl alone.",
    )
    dry_run: bool = flag(
        False,
        "Check the flags, print the memory plan and DeepSpeed's configuration, and exit without "
        "loading models or data.",
    )
    fit: Literal["none", "auto"] = flag(
        "none",
        "auto: if the memory plan does not fit the GPU, take the cheapest flags with which it "
        "fits, and say which. They change speed, not what is learned.",
    )
    ignore_memory_plan: bool = flag(
        False, "Start even if the memory plan says that the run does not fit the GPU."
    )
    local_rank: int = flag(-1, "Set by the launcher.")
    deepspeed: bool = flag(False, "Accepted for compatibility, no effect.")
    deepspeed_config: Optional[str] = flag(
        None, "JSON file that is merged into the generated DeepSpeed configuration."
    )
    deepscale: bool = flag(False, "Old name of --deepspeed, no effect.")
    deepscale_config: Optional[str] = flag(None, "Old name of --deepspeed_config.")

    @property
    def deepspeed_file(self) -> tuple[str | None, str]:
        """The file that is merged into the DeepSpeed configuration, and the flag that names it."""
        if self.deepspeed_config is None and self.deepscale_config is not None:
            return self.deepscale_config, "--deepscale_config"
        return self.deepspeed_config, "--deepspeed_config"

    @property
    def loggers(self) -> list[str]:
        """The names in --report_to, each once; with --enable_tensorboard also tensorboard."""
        given = [name for word in self.report_to for name in word.split(",")]
        given += ["tensorboard"] if self.enable_tensorboard else []
        names = [name.strip().lower() for name in given]
        return [name for name in dict.fromkeys(names) if name not in ("", "none")]

    def problems(self) -> list[str]:
        """Return everything that is wrong with these options, one sentence each."""
        counts = ("save_interval", "save_total_limit", "log_interval_s", "max_restarts")
        found = fields_at_least(self, (*counts, "hang_timeout_s", "restart_delay_s"), 0)
        if self.output_dir == "":
            found.append(
                "--output_dir has no value: give a folder, or leave the flag out to save nothing."
            )
        if self.output_dir and self.output_dir.startswith("~"):
            # The shell expands ~ neither in a configuration file nor after "=". Without this check
            # the run would make a folder called ~.
            found.append(f"--output_dir {self.output_dir}: give the path in full, without ~.")
        found += seed_value("--seed", self.seed)
        found += _logger_problems(self.loggers, output_dir=self.output_dir)
        if self.output_dir is None:
            reason = "needs --output_dir: checkpoints are saved there."
            if self.save_interval:
                found.append(f"--save_interval {self.save_interval} {reason}")
            if self.resume:
                found.append(f"--resume {self.resume} {reason}")
        return found + self._restart_problems()

    def _restart_problems(self) -> list[str]:
        """Return why the run could not be restarted, if --max_restarts is given."""
        given = f"--max_restarts {self.max_restarts}"
        if self.max_restarts < 1 or self.dry_run:
            return []
        if not self.output_dir or not self.save_interval:
            return [f"{given} needs --output_dir and --save_interval: a restart uses checkpoints."]
        if supervisor.VARIABLE not in os.environ:
            return [
                f"{given}: this launcher does not restart a run. Put python -m dschat.supervise "
                "before the whole command, and the flag on the command line, after main.py."
            ]
        return []


def _logger_problems(names: list[str], *, output_dir: str | None) -> list[str]:
    found = []
    for name in names:
        package = LOGGER_PACKAGES.get(name)
        if package is None:
            found.append(
                f"--report_to {name}: no logger of that name. Give {', '.join(LOGGER_PACKAGES)}."
            )
        elif importlib.util.find_spec(package) is None:
            found.append(
                f"--report_to {name}: the package {package} is not installed. Install it (pip "
                f"install {package}), or leave it out."
            )
        elif name == "csv" and output_dir is None:
            found.append("--report_to csv needs --output_dir: metrics.csv is written there.")
    return found


@dataclass(frozen=True)
class LoraOptions:
    """LoRA of one model. Step 3 has one set for the actor and one for the critic."""

    _argument_group_name = "LoRA"

    lora_dim: int = flag(0, "Rank of the LoRA adapters; 0: no adapters.")
    lora_module_name: Optional[str] = flag(
        None,
        "Adapt the linear layers and experts whose full name contains this. Default: all of the "
        "decoder layers.",
    )
    target_modules: list[str] = flag(
        [],
        "Adapt these linear layers of the decoder: names such as q_proj v_proj, all-linear, or a "
        "regular expression that matches full names.",
    )
    lora_alpha: float = flag(1.0, "LoRA scale: the product is multiplied by lora_alpha / lora_dim.")
    use_rslora: bool = flag(
        False, "Multiply by lora_alpha / sqrt(lora_dim) instead (rsLoRA), for high ranks."
    )
    modules_to_save: list[str] = flag(
        [],
        "With --only_optimize_lora, train these modules whole as well, such as embed_tokens "
        "lm_head. They are saved with the adapter.",
    )
    only_optimize_lora: bool = flag(False, "Train only the adapters, new heads and new tokens.")
    lora_learning_rate: float = flag(5e-4, "Learning rate of the adapters.")
    lora_experts: bool = flag(
        True,
        "Adapt the experts of a mixture of experts as well, each with its own adapter. Routers are "
        "never adapted.",
    )

    def __hash__(self) -> int:
        """Hash of all values: lists have none."""
        return hash(repr(self))

    @property
    def keeps_start(self) -> bool:
        """Whether the model without its adapters stays the one that training began from."""
        return self.only_optimize_lora and not self.modules_to_save

    @property
    def chooses_layers(self) -> bool:
        """Whether the user chose the layers that are adapted."""
        return self.lora_module_name is not None or bool(self.target_modules)


@dataclass(frozen=True)
class SystemOptions:
    """ZeRO, offloading and memory options of one model.

    Step 3 has one set for the actor and one for the critic.
    """

    _argument_group_name = "system"

    zero_stage: int = flag(0, "ZeRO stage, 0 to 3.")
    offload: bool = flag(False, "Keep optimizer states (ZeRO-3: parameters too) in host memory.")
    pin_memory: bool = flag(
        True,
        "Page-lock offloaded memory. Copies are faster, but each buffer is rounded up to the next "
        "power of two bytes.",
    )
    gradient_checkpointing: bool = flag(False, "Recompute activations in backward.")
    compile_layers: bool = flag(
        True,
        "On a GPU, train with compiled decoder layers: the first updates take about half a minute "
        "longer. Without effect under ZeRO-3 and with --quantize_frozen.",
    )
    dropout: Optional[float] = flag(
        None, "Dropout probability of every layer. Default: as in the model's configuration."
    )
    freeze_layers: int = flag(
        0, "Freeze the embeddings and this many of the lowest decoder layers."
    )
    enable_mixed_precision_lora: bool = flag(
        False,
        "MixZ++: the same as --quantize_frozen int8.",
    )
    quantize_frozen: FrozenFormat = flag(
        "none",
        "Keep the weights that LoRA adapts in int8 (half the memory of bf16) or nf4 (a quarter). "
        "They are rounded once, at the start. Needs --lora_dim; any ZeRO stage.",
    )

    @property
    def frozen_format(self) -> FrozenFormat:
        """Storage of the weights that LoRA adapts."""
        if self.enable_mixed_precision_lora and self.quantize_frozen == "none":
            return "int8"
        return self.quantize_frozen


@dataclass(frozen=True)
class OneModelOptions(ModelOptions):
    """The model of a step that trains one."""

    model_name_or_path: str = flag("", "Model folder or hub id. Required.")

    @property
    def by_flag(self) -> dict[str, list[str]]:
        """The flags that name models, and their values."""
        return {"--model_name_or_path": [self.model_name_or_path]}


@dataclass(frozen=True)
class BatchOptions:
    """Batch sizes of a step that trains one model."""

    _argument_group_name = "batch"

    per_device_train_batch_size: int = flag(16, "Rows per rank and micro-batch in training.")
    per_device_eval_batch_size: int = flag(16, "Rows per rank and batch in evaluation.")
    tokens_per_batch: int = flag(
        0,
        "Divide the rows of an update into micro-batches of like length with at most this many "
        "tokens, padding included; 0: into micro-batches of --per_device_train_batch_size rows.",
    )
    packing: bool = flag(
        False,
        "Put several training texts in each row of --max_seq_len tokens (step 2 and DPO: several "
        "pairs in each row of twice as many); no text sees another. The batch size then counts "
        "packed rows.",
    )

    def layout(self, accumulation: int) -> tuple[int, int]:
        """Return the rows of a micro-batch and the micro-batches of an update, for DeepSpeed.

        Args:
            accumulation: value of --gradient_accumulation_steps.
        """
        return micro_batch_layout(
            self.per_device_train_batch_size, accumulation, tokens=self.tokens_per_batch
        )


def micro_batch_layout(rows: int, accumulation: int, *, tokens: int) -> tuple[int, int]:
    """Return the rows of a micro-batch and the micro-batches of an update, for DeepSpeed.

    With a limit of tokens both vary: these are the fewest rows and the most micro-batches.

    Args:
        rows: rows of a micro-batch without a limit.
        accumulation: value of --gradient_accumulation_steps.
        tokens: most tokens of a micro-batch; 0: no limit.
    """
    return (1, rows * accumulation) if tokens else (rows, accumulation)


@dataclass(frozen=True)
class OptimOptions:
    """The optimizer of a step that trains one model."""

    _argument_group_name = "optimiser"

    learning_rate: float = flag(1e-3, "Peak learning rate of the base weights.")
    weight_decay: float = flag(
        0.0, "AdamW weight decay of matrices. Biases and norms are not decayed."
    )
    compute_fp32_loss: bool = flag(
        False, "Accepted for compatibility, no effect: losses are always computed in fp32."
    )
    router_aux_loss_coef: float = flag(
        0.0,
        "Weight of the loss that evens out the load of experts, for mixtures of experts; logs it "
        "and the load. 0: off. Decoder layers are then not compiled.",
    )
