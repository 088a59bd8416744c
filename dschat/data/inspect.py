"""Show what the steps would read: ``python -m dschat.data.inspect --data_path rows.jsonl --model folder``."""

from dataclasses import dataclass, field
from typing import Optional

from transformers import PreTrainedTokenizerBase

from dschat.config.options import DataOptions, flag
from dschat.config.parse import parse_config
from dschat.data.datasets import PairDataset, PromptDataset, SFTDataset
from dschat.data.loaders import open_blends
from dschat.data.splits import Blend
from dschat.models.tokenizer import load_tokenizer
from dschat.runtime.log import run_main

STAGES = {
    1: ("supervised fine-tuning", "chosen"),
    2: ("reward model", "rejected"),
    3: ("PPO", "prompt"),
}


@dataclass(frozen=True)
class InspectOptions:
    model: str = field(metadata={"help": "Folder or hub name of the tokenizer."})
    max_seq_len: int = flag(512, "Longest text in tokens, and longest prompt.")
    num_shown: int = flag(2, "Rows shown of each step.")
    add_eot_token: bool = flag(
        False, "Add --eot_token as a special token and end every answer with it."
    )
    eot_token: str = flag("<|endoftext|>", "The end-of-text token that --add_eot_token adds.")
    trust_remote_code: bool = flag(
        False, "Run code that a tokenizer's folder or hub repository brings along."
    )


@dataclass(frozen=True)
class InspectConfig:
    """What the steps read."""

    data: DataOptions
    options: InspectOptions

    def problems(self) -> list[str]:
        """Nothing: reading the data finds what is wrong with its options."""
        return []


def main(argv: Optional[list[str]] = None) -> None:
    """Print the number of rows of each step, and some of them as text with their token counts."""
    config = parse_config(InspectConfig, argv)
    data, options = config.data, config.options
    tokenizer = load_tokenizer(
        options.model,
        add_eot_token=options.add_eot_token,
        eot_token=options.eot_token,
        trust_remote_code=options.trust_remote_code,
        flag="--model",
    )
    failures = []
    for stage, (title, needs) in STAGES.items():
        try:
            train, held_out = open_blends(data, stage=stage, needs=needs)
        except ValueError as error:
            failures.append(error)
            print(f"step {stage}, {title}: nothing to read: {error}")
            continue
        print(f"step {stage}, {title}: {len(train)} rows to train on, {len(held_out)} held out")
        for index in range(min(options.num_shown, len(train))):
            print(f"  {train[index].place}")
            for name, ids in _items(train, tokenizer, data, stage, options.max_seq_len)[
                index
            ].items():
                if name in ("input_ids", "chosen_ids", "rejected_ids"):
                    print(
                        f"    {name.removesuffix('_ids')}, {len(ids)} tokens: {tokenizer.decode(ids)!r}"
                    )
    if len(failures) == len(STAGES):
        raise failures[0]


def _items(
    rows: Blend, tokenizer: PreTrainedTokenizerBase, data: DataOptions, stage: int, max_seq_len: int
):
    """The data set of a step over `rows`."""
    if stage == 3:
        return PromptDataset(
            rows, tokenizer, max_prompt_len=max_seq_len, prompt_format=data.prompt_format
        )
    chosen = SFTDataset if stage == 1 else PairDataset
    end = tokenizer.eos_token_id
    return chosen(
        rows, tokenizer, max_seq_len=max_seq_len, prompt_format=data.prompt_format, end_token_id=end
    )


if __name__ == "__main__":
    run_main(main)
