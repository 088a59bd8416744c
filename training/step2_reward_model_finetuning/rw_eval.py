"""Score a few good and bad answers with a reward model, and measure accuracy on a file of pairs."""

from functools import partial

from dschat.config.eval_tools import Pairs, RewardEvalConfig
from dschat.config.parse import parse_config
from dschat.runtime.log import run_main

if __name__ == "__main__":
    # Stop at a wrong flag or --help before the imports below, which take seconds.
    run_main(partial(parse_config, RewardEvalConfig))

import torch
from torch.utils.data import DataLoader

from dschat.algorithms.masks import pool_last
from dschat.data.collate import collate_pairs
from dschat.data.datasets import PairDataset
from dschat.data.preparation import prepare
from dschat.data.prompt_files import read_rows
from dschat.data.row import Row
from dschat.memory.checks import check_length
from dschat.memory.model_size import named_size
from dschat.models.inference_device import inference_placement
from dschat.models.reward_model import RewardModel, load_reward_model
from dschat.models.tokenizer import end_token_id, load_tokenizer
from dschat.runtime.run_record import recorded_format

EXAMPLES = (
    (
        "How long should I boil an egg?",
        "Six minutes for a soft yolk and ten for a firm one, counted from when the water boils "
        "again.",
        "Eggs come from hens. Hens are birds. Boil boil boil.",
    ),
    (
        "My friend lost her job. What can I say to her?",
        "Tell her that you are sorry to hear it, ask how she is, and offer to help with the search "
        "if she would like that.",
        "Tell her that it was surely her own fault.",
    ),
    (
        "Why is the sky blue?",
        "Air scatters the short waves of sunlight more than the long ones, so blue light reaches "
        "us from all sides.",
        "It is not, it is green, and nobody knows why.",
    ),
    (
        "Name three fruits that keep well in winter.",
        "Apples, pears and quinces keep for months in a cool and dark place.",
        "Winter is a cold season.",
    ),
)


def scores(dataset: PairDataset, model: RewardModel, *, batch_size: int) -> torch.Tensor:
    """Return the scores of the chosen and the rejected answer of each pair, [N, 2] fp32."""
    device = next(model.parameters()).device
    found = []
    collate = partial(collate_pairs, pad_id=dataset.tokenizer.pad_token_id)
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collate):
        batch = batch.to(device)
        with torch.no_grad():
            values = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        found.append(torch.stack(pool_last(values, batch.attention_mask).chunk(2), dim=-1).cpu())
    return torch.cat(found)


def main() -> None:
    """Print the scores of the examples, and accuracy and mean scores of --pairs_file."""
    config = parse_config(RewardEvalConfig)
    options = config.model
    pairs = config.pairs
    if options.num_padding_at_beginning != 1:
        print("--num_padding_at_beginning has no effect: positions come from the attention mask")
    rows = []
    if pairs.pairs_file:
        rows = read_rows(pairs.pairs_file, flag="--pairs_file", needs="rejected")
    device, dtype = inference_placement(options.dtype)
    ending = dict(add_eot_token=options.add_eot_token, eot_token=options.eot_token)
    path = options.model_name_or_path
    remote = dict(trust_remote_code=options.trust_remote_code)
    size = named_size(path, flag="--model_name_or_path", reward=True, **remote)
    check_length(pairs.max_seq_len, size, path)
    tokenizer = load_tokenizer(path, **ending, **remote)
    model = load_reward_model(path, dtype=dtype, tokenizer=tokenizer, **remote).to(device).eval()
    encode = partial(
        PairDataset,
        tokenizer=tokenizer,
        max_seq_len=pairs.max_seq_len,
        prompt_format=recorded_format(path, pairs.prompt_format),
        end_token_id=end_token_id(tokenizer, **ending),
        truncation="share",
    )
    examples = [
        Row(f"\n\nHuman: {prompt}\n\nAssistant:", f" {good}", f" {bad}")
        for prompt, good, bad in EXAMPLES
    ]
    found = scores(encode(examples), model, batch_size=pairs.batch_size).tolist()
    for (prompt, good, bad), (good_score, bad_score) in zip(EXAMPLES, found, strict=True):
        print(f"\nprompt: {prompt}")
        print(f"  good {good_score:8.3f}  {good}\n  bad  {bad_score:8.3f}  {bad}")
    if rows:
        print_accuracy(model, encode(rows), pairs)


def print_accuracy(model: RewardModel, dataset: PairDataset, pairs: Pairs) -> None:
    """Print accuracy and mean scores on the pairs of --pairs_file.

    Raises:
        ValueError: no pair is left, because all are longer than --max_seq_len.
    """
    report = prepare(dataset, cache_dir=None, skip_bad_rows=False, name=pairs.pairs_file)
    described = report.describe(f"--max_seq_len {pairs.max_seq_len}")
    if not report.kept:
        raise ValueError(
            f"--pairs_file {pairs.pairs_file}: no pair is left: {described}. Give a larger "
            "--max_seq_len, or other pairs."
        )
    print(f"\n{pairs.pairs_file}: {described}")
    chosen, rejected = scores(dataset, model, batch_size=pairs.batch_size).double().unbind(-1)
    right = int((chosen > rejected).sum())
    num_pairs = len(dataset)
    print(f"accuracy {right / num_pairs:.4f} ({right} of {num_pairs} pairs; a tie counts as wrong)")
    print(f"mean score: chosen {chosen.mean():.3f}, rejected {rejected.mean():.3f}")


if __name__ == "__main__":
    run_main(main)
