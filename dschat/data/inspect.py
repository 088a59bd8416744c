"""Show what each step would read.

``python -m dschat.data.inspect --data_path rows.jsonl --model folder``
"""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from dschat.config.options import DataOptions, flag
from dschat.config.parse import parse_config
from dschat.data.datasets import PairDataset, PromptDataset, SFTDataset
from dschat.data.loaders import open_blends
from dschat.data.splits import Blend
from dschat.models.tokenizer import load_tokenizer
from dschat.runtime.log import run_main

# The title of each step, and the text that its rows need.
STEPS = {
    1: ("supervised fine-tuning", "chosen"),
    2: ("reward model", "rejected"),
    3: ("PPO", "prompt"),
}


@dataclass(frozen=True)
class InspectOptions:
    """Options of this program: the tokenizer, and how much to show."""

    model: str = field(metadata={"help": "Folder or hub name of the tokenizer."})
    max_seq_len: int = flag(512, "Longest text in tokens, and longest prompt.")
    num_shown: int = flag(2, "Rows to show of each step.")
    add_eot_token: bool = flag(
        False, "Add --eot_token as a special token and end every answer with it."
    )
    eot_token: str = flag("<|endoftext|>", "The end-of-text token that --add_eot_token adds.")
    trust_remote_code: bool = flag(False, "Run code from the tokenizer's folder or hub repository.")


@dataclass(frozen=True)
class InspectConfig:
    """Rows that each step would read."""

    data: DataOptions
    options: InspectOptions

    def problems(self) -> list[str]:
        """Return no problems: reading the data finds those of its options."""
        return []


def main(argv: list[str] | None = None) -> None:
    """Print the number of rows of each step, and some of them as text with their token counts."""
    config = parse_config(InspectConfig, argv)
    data = config.data
    options = config.options
    tokenizer = load_tokenizer(
        options.model,
        add_eot_token=options.add_eot_token,
        eot_token=options.eot_token,
        trust_remote_code=options.trust_remote_code,
        flag="--model",
    )
    failures = []
    for step, (title, needs) in STEPS.items():
        try:
            train, held_out = open_blends(data, step=step, needs=needs)
        except ValueError as error:
            failures.append(error)
            print(f"step {step}, {title}: nothing to read: {error}")
            continue
        print(f"step {step}, {title}: {len(train)} rows to train on, {len(held_out)} held out")
        dataset = _build_dataset(step, train, tokenizer, data.prompt_format, options.max_seq_len)
        for index in range(min(options.num_shown, len(train))):
            print(f"  {train[index].place}")
            _print_item(dataset[index], tokenizer)
    if len(failures) == len(STEPS):
        raise failures[0]


def _build_dataset(
    step: int,
    rows: Blend,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: str,
    max_seq_len: int,
) -> SFTDataset | PairDataset | PromptDataset:
    if step == 3:
        return PromptDataset(
            rows, tokenizer, max_prompt_len=max_seq_len, prompt_format=prompt_format
        )
    dataset_class = SFTDataset if step == 1 else PairDataset
    return dataset_class(
        rows,
        tokenizer,
        max_seq_len=max_seq_len,
        prompt_format=prompt_format,
        end_token_id=tokenizer.eos_token_id,
    )


def _print_item(item: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("input_ids", "chosen_ids", "rejected_ids"):
        if name in item:
            ids = item[name]
            text = tokenizer.decode(ids)
            print(f"    {name.removesuffix('_ids')}, {len(ids)} tokens: {text!r}")


if __name__ == "__main__":
    run_main(main)
