"""The configurations of the evaluation programs."""

from dataclasses import dataclass
from typing import Literal, Optional

from dschat.config.options import Dtype, ModelOptions, PromptFormat, flag
from dschat.config.value_checks import (
    at_least,
    fields_at_least,
    in_range,
    required,
    seed_value,
)

NUM_PADDING_HELP = "Accepted for compatibility, no effect: positions come from the attention mask."


@dataclass(frozen=True)
class InferenceModel(ModelOptions):
    """A model that is not trained."""

    dtype: Dtype = flag("auto", "Precision; auto: bf16 (else fp16) on a GPU, fp32 on a CPU.")


@dataclass(frozen=True)
class TwoModels(InferenceModel):
    """The two models that are compared."""

    model_name_or_path_baseline: str = flag(
        "", "The model before training, folder or hub id. Required."
    )
    model_name_or_path_finetune: str = flag(
        "", "The model after training, folder or hub id. Required."
    )


@dataclass(frozen=True)
class Prompts:
    """The prompts and their text format."""

    _argument_group_name = "prompts"

    language: Literal["English", "Chinese", "Japanese"] = flag(
        "English", "Language of the built-in prompts."
    )
    prompts_file: Optional[str] = flag(
        None,
        "Prompts to use instead of the built-in ones: .txt with one per line, or .jsonl, .json or "
        ".csv with a field prompt.",
    )
    prompt_format: PromptFormat = flag(
        "auto",
        "Text format of prompts, like --prompt_format of step 1; auto: that of the run that made "
        "the model, by its run.json.",
    )
    max_prompt_seq_len: int = flag(
        512, "Longest prompt in tokens; longer prompts lose their beginning."
    )
    batch_size: int = flag(8, "Prompts per batch.")


@dataclass(frozen=True)
class Answering:
    """Generation of answers."""

    _argument_group_name = "generation"

    max_new_tokens: int = flag(100, "Most tokens of an answer.")
    num_beams: int = flag(1, "Above 1: also show the answer of a beam search of this width.")
    num_return_sequences: int = flag(1, "Above 1: also show this many sampled answers.")
    top_k: int = flag(4, "Sample from this many likeliest tokens; 0: from all.")
    seed: int = flag(1234, "Seed of the sampled answers.")
    num_beam_groups: int = flag(
        1, "Accepted for compatibility, must be 1: transformers no longer has group beam search."
    )
    penalty_alpha: float = flag(
        0.6,
        "Accepted for compatibility, no effect: transformers no longer has contrastive search.",
    )


@dataclass(frozen=True)
class PromptEvalConfig:
    """Answers of two models to the same prompts."""

    model: TwoModels
    prompts: Prompts
    answering: Answering

    def problems(self) -> list[str]:
        """Return everything that is wrong with these options, one sentence each."""
        found = []
        model = self.model
        found += required("--model_name_or_path_baseline", model.model_name_or_path_baseline)
        found += required("--model_name_or_path_finetune", model.model_name_or_path_finetune)
        counts = ("max_new_tokens", "num_beams", "num_return_sequences")
        found += fields_at_least(self.answering, counts, 1)
        found += fields_at_least(self.prompts, ("max_prompt_seq_len", "batch_size"), 1)
        found += at_least("--top_k", self.answering.top_k, 0)
        found += seed_value("--seed", self.answering.seed)
        found += in_range("--penalty_alpha", self.answering.penalty_alpha, 0.0, 1.0)
        if self.answering.num_beam_groups != 1:
            found.append(
                f"--num_beam_groups {self.answering.num_beam_groups}: transformers no longer has "
                "group beam search. Leave it at 1."
            )
        return found


@dataclass(frozen=True)
class ScoredModel(InferenceModel):
    """The reward model."""

    model_name_or_path: str = flag("", "Reward model, folder or hub id. Required.")
    num_padding_at_beginning: int = flag(1, NUM_PADDING_HELP)


@dataclass(frozen=True)
class Pairs:
    """The pairs that are scored."""

    _argument_group_name = "pairs"

    pairs_file: Optional[str] = flag(
        None,
        "Report the accuracy on these pairs: .jsonl, .json or .csv with fields prompt, chosen and "
        "rejected.",
    )
    prompt_format: PromptFormat = flag(
        "auto",
        "Text format of pairs, like --prompt_format of step 2; auto: that of the run that made the "
        "model, by its run.json.",
    )
    max_seq_len: int = flag(512, "Longest text in tokens; longer prompts lose their beginning.")
    batch_size: int = flag(8, "Pairs per batch.")


@dataclass(frozen=True)
class RewardEvalConfig:
    """Scores of a reward model."""

    model: ScoredModel
    pairs: Pairs

    def problems(self) -> list[str]:
        """Return everything that is wrong with these options, one sentence each."""
        found = required("--model_name_or_path", self.model.model_name_or_path)
        found += at_least("--max_seq_len", self.pairs.max_seq_len, 2)
        return found + at_least("--batch_size", self.pairs.batch_size, 1)
