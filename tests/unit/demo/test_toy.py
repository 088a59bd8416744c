"""Toy data: no prompt is in both files, and every word is in both."""

import json

from dschat.config.sft import SFTData
from dschat.data.blends import open_blends
from dschat.demo.toy import write_toy_data


def prompts(path) -> set[str]:
    return {json.loads(line)["prompt"] for line in path.read_text().splitlines()}


def test_every_training_row_is_used(tmp_path, caplog):
    folder = write_toy_data(tmp_path / "toy")
    train, held_out = prompts(folder / "train.jsonl"), prompts(folder / "eval.jsonl")
    assert len(train) > 6 and held_out and not train & held_out
    assert set(" ".join(train).split()) == set(" ".join(held_out).split())
    data = SFTData(data_path=[str(folder)], data_split="1,0,0")
    rows, evaluation = open_blends(data, step=1, needs="chosen")
    assert (len(rows), len(evaluation)) == (256, 64)
    assert "left out" not in caplog.text
