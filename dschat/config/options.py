"""Option groups that the steps share.

Each group is a frozen dataclass; a step (see ``steps.py``) is a set of groups. A field is a command-line flag of
the same name and a key of a YAML or JSON file. Names and defaults follow DeepSpeed-Chat; where one differs,
docs/differences_from_deepspeed_chat.md says why.
"""

from dataclasses import dataclass, field
from typing import Literal, Optional

from dschat.config.value_checks import at_least, seed_value

Dtype = Literal["auto", "fp16", "bf16", "fp32"]
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]
PromptFormat = Literal["auto", "plain", "human_assistant", "chat"]


def flag(default, help_text: str):
    """A dataclass field with a help text; lists and dicts get a factory."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help_text})
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class DataOptions:
    _argument_group_name = "data"

    data_path: list[str] = flag(
        ["Dahoas/rm-static"],
        "Data sets, blended: local .json/.jsonl/.csv/.parquet files, folders holding train.* and eval.*, folders of "
        "datasets.save_to_disk, or hub names.",
    )
    data_split: str = flag(
        "2,4,4", "Shares of the data for steps 1, 2 and 3; disjoint, and the same in every step."
    )
    data_output_path: Optional[str] = flag(
        None, "Cache folder for data sets. Default: the user's cache folder."
    )
    data_seed: int = flag(1234, "Seed of the split alone, so that splits never depend on --seed.")
    eval_fraction: float = flag(
        0.1, "Share held out from a source that has no evaluation split of its own."
    )
    prompt_format: PromptFormat = flag(
        "auto",
        "How rows become text: plain (prompt + answer as they stand), human_assistant, chat (the tokenizer's chat "
        "template), or auto (messages: the chat template where there is one, else human_assistant; other rows: plain).",
    )
    skip_bad_rows: bool = flag(
        False, "Skip and count malformed rows instead of stopping with an error."
    )


@dataclass(frozen=True)
class TextOptions(DataOptions):
    """The data of a step on whole texts."""

    max_seq_len: int = flag(512, "Longest text in tokens; longer prompts lose their beginning.")


@dataclass(frozen=True)
class ModelOptions:
    _argument_group_name = "model"

    dtype: Dtype = flag(
        "auto", "Training precision; auto takes bf16 where the device has it, else fp16."
    )
    add_eot_token: bool = flag(
        False, "Add --eot_token as a special token and end every answer with it."
    )
    eot_token: str = flag("<|endoftext|>", "The end-of-text token that --add_eot_token adds.")
    trust_remote_code: bool = flag(
        False, "Run code that a model folder or hub repository brings along."
    )


@dataclass(frozen=True)
class ScheduleOptions:
    _argument_group_name = "schedule"

    num_train_epochs: int = flag(1, "Passes over the training data.")
    max_train_steps: int = flag(
        0, "Stop after this many optimizer steps (step 3: rollouts); 0: whole epochs."
    )
    lr_scheduler_type: Scheduler = flag("cosine", "Learning-rate schedule of transformers.")
    num_warmup_steps: int = flag(0, "Optimizer steps of linear warm-up.")
    gradient_accumulation_steps: int = flag(1, "Micro-batches per optimizer step.")


@dataclass(frozen=True)
class RunOptions:
    _argument_group_name = "run"

    output_dir: Optional[str] = flag(None, "Where the model, metrics.jsonl and run.json go.")
    seed: int = flag(1234, "Seed of initialisation, data order and sampling.")
    save_interval: int = flag(
        0,
        "Write a checkpoint to resume from every so many optimizer steps (step 3: rollouts); 0: when stopped only.",
    )
    save_total_limit: int = flag(
        2, "Keep this many checkpoints, and delete older ones; 0: keep all."
    )
    resume: Optional[str] = flag(
        None,
        "Go on from a checkpoint: latest (the newest whole one in --output_dir, or from the start), or its folder.",
    )
    log_interval_s: float = flag(5.0, "Seconds between progress lines.")
    enable_tensorboard: bool = flag(
        False, "Write TensorBoard events, of the pipeline and of each engine."
    )
    dry_run: bool = flag(
        False,
        "Check the flags, print the memory plan and DeepSpeed's configuration, and stop: no model, data or hub.",
    )
    ignore_memory_plan: bool = flag(
        False, "Start even if the memory plan says that the run does not fit the GPU."
    )
    local_rank: int = flag(-1, "Set by the launcher.")
    deepspeed: bool = flag(False, "Accepted for compatibility; has no effect.")
    deepspeed_config: Optional[str] = flag(
        None, "JSON file merged over the generated DeepSpeed configuration."
    )
    deepscale: bool = flag(False, "Old name of --deepspeed; has no effect.")
    deepscale_config: Optional[str] = flag(None, "Old name of --deepspeed_config.")

    def problems(self) -> list[str]:
        """Everything that is wrong with these options, one sentence each."""
        found = []
        for name in ("save_interval", "save_total_limit", "log_interval_s"):
            found += at_least(f"--{name}", getattr(self, name), 0)
        if self.output_dir == "":
            found.append(
                "--output_dir has no value: give a folder, or leave the flag out to save nothing."
            )
        if self.output_dir and self.output_dir.startswith("~"):
            # In a file of flags, or behind "=", no shell puts the home folder there; nobody wants a folder called ~.
            found.append(f"--output_dir {self.output_dir}: give the path in full, without ~.")
        found += seed_value("--seed", self.seed)
        if self.output_dir is None:
            for name in ("save_interval", "resume"):
                if getattr(self, name):
                    found.append(
                        f"--{name} {getattr(self, name)} needs --output_dir: checkpoints lie in it."
                    )
        return found


@dataclass(frozen=True)
class LoraOptions:
    """LoRA of one model. Step 3 has an actor and a critic twin."""

    _argument_group_name = "LoRA"

    lora_dim: int = flag(0, "Rank of the LoRA adapters; 0: none.")
    lora_module_name: Optional[str] = flag(
        None,
        "Adapt the linear layers whose full name contains this. Default: the family's decoder layers.",
    )
    lora_alpha: float = flag(1.0, "LoRA scale: the update is multiplied by lora_alpha / lora_dim.")
    only_optimize_lora: bool = flag(False, "Train the adapters and new heads only.")
    lora_learning_rate: float = flag(5e-4, "Learning rate of the adapters.")


@dataclass(frozen=True)
class SystemOptions:
    """How one model is trained on the machine. Step 3 has an actor and a critic twin."""

    _argument_group_name = "system"

    zero_stage: int = flag(0, "ZeRO stage, 0 to 3.")
    offload: bool = flag(False, "Keep optimizer states (ZeRO-3: parameters too) in host memory.")
    pin_memory: bool = flag(
        True,
        "What is offloaded is page-locked, which copies faster; each buffer then takes the next power of two of bytes.",
    )
    gradient_checkpointing: bool = flag(False, "Recompute activations in backward.")
    dropout: Optional[float] = flag(
        None, "Set every dropout probability of the model. Default: the model's own."
    )
    freeze_layers: int = flag(
        0, "Freeze the embeddings and this many of the lowest decoder layers."
    )
    enable_mixed_precision_lora: bool = flag(
        False,
        "MixZ++: keep the weights that LoRA adapts in int8 (needs --lora_dim; any ZeRO stage).",
    )


@dataclass(frozen=True)
class OneModelOptions(ModelOptions):
    model_name_or_path: str = flag("", "Model folder or hub id. Required.")

    @property
    def by_flag(self) -> dict[str, list[str]]:
        """The flags that name models, and what they name."""
        return {"--model_name_or_path": [self.model_name_or_path]}


@dataclass(frozen=True)
class BatchOptions:
    _argument_group_name = "batch"

    per_device_train_batch_size: int = flag(16, "Rows per process and micro-batch in training.")
    per_device_eval_batch_size: int = flag(16, "Rows per process in evaluation.")


@dataclass(frozen=True)
class OptimOptions:
    _argument_group_name = "optimiser"

    learning_rate: float = flag(1e-3, "Peak learning rate of the base weights.")
    weight_decay: float = flag(0.0, "AdamW weight decay of matrices; biases and norms have none.")
    compute_fp32_loss: bool = flag(
        False, "Accepted for compatibility: losses are always computed in fp32."
    )
