"""The part of a data set that each step reads, and the flags that choose another."""

import datasets
import pytest

from dschat.config.options import DataOptions
from dschat.data.blends import open_blends
from tests.unit.data_helpers import pairs

BEGINS = {"train_prefs": 100, "test_prefs": 200, "train_sft": 300, "test_sft": 400}
NEEDS = {1: "chosen", 2: "rejected", 3: "prompt"}


@pytest.fixture
def folder(tmp_path):
    """Return a folder of datasets.save_to_disk with the parts of UltraFeedback."""
    parts = {name: datasets.Dataset.from_list(pairs(30, begin)) for name, begin in BEGINS.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    return tmp_path / "set"


def hundreds(step, path, **options):
    """Return the parts that the training and evaluation rows of a step begin with."""
    data = DataOptions(data_path=[str(path)], data_split="1,1,1", **options)
    blends = open_blends(data, step=step, needs=NEEDS[step])
    return [{int(blend[i].prompt[1:]) // 100 for i in range(len(blend))} for blend in blends]


@pytest.mark.parametrize("step, expected", [(1, [{3}, {4}]), (2, [{1}, {2}]), (3, [{1}, {2}])])
def test_each_step_reads_its_part(folder, step, expected):
    assert hundreds(step, folder) == expected


def test_the_suffix_takes_precedence_over_the_flag(folder):
    assert hundreds(2, folder, dataset_split="train_sft") == [{3}, {4}]
    assert hundreds(2, f"{folder}@train_prefs", dataset_split="train_sft") == [{1}, {2}]


def test_the_configuration_reaches_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config=None, **options):
        asked.append((name, config))
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(pairs(60))})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hundreds(1, "owner/name", dataset_config="main")
    hundreds(1, "owner/name:other", dataset_config="main")
    assert asked == [("owner/name", "main"), ("owner/name", "other")]
