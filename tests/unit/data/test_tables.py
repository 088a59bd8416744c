import csv
import gzip
import json
import logging
import os
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dschat.data.tables import Entry, open_tables, parse_entry
from tests.unit.data_helpers import pairs, write_lines

PREFERRED = {1: ("sft", "gen"), 2: ("prefs", "preference"), 3: ("gen", "prefs", "sft")}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def open_entry(text, **options):
    """Open an entry with its suffix, as load_source does."""
    entry = parse_entry(str(text))
    options = {"config": entry.config, "split": entry.split, **options}
    return open_tables(entry.path, **options)


def prompts(table):
    return [row["prompt"] for row in table.rows]


def names(begin, end):
    return [f"p{number}" for number in range(begin, end)]


def dataset(num_rows, begin=0):
    return datasets.Dataset.from_list(pairs(num_rows, begin))


def save_parts(folder, **parts):
    """Save a folder of datasets.save_to_disk; each part has two rows that begin at its number."""
    stored = {name: dataset(2, begin) for name, begin in parts.items()}
    datasets.DatasetDict(stored).save_to_disk(folder)
    return folder


def write_parquet(path, num_rows, begin=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset(num_rows, begin).to_parquet(path)


# Files


def write_file(path, rows):
    """Write `rows` in the format of the suffix."""
    kind = path.name.removeprefix("rows").removesuffix(".gz").removesuffix(".zst")
    if kind == ".json":
        data = ("[" + ",\n".join(map(json.dumps, rows)) + "]").encode()
    elif kind in (".jsonl", ".ndjson"):
        data = "\n".join(map(json.dumps, rows)).encode()
    else:
        mark = "\t" if kind == ".tsv" else ","
        data = "".join(mark.join(row) + "\n" for row in [rows[0], *(r.values() for r in rows)])
        data = data.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        # Two frames, as zstd writes for a file that was appended to.
        compress = pytest.importorskip("zstandard").ZstdCompressor().compress
        data = compress(data[:20]) + compress(data[20:])
    path.write_bytes(data)


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".json", ".jsonl", ".ndjson", ".csv", ".tsv"])
def test_every_text_format_and_its_compressed_form(tmp_path, kind, compression):
    path = tmp_path / f"rows{kind}{compression}"
    write_file(path, pairs(3))
    table = open_entry(path)["train"]
    assert list(table.rows) == pairs(3)
    line = 4 if kind in (".csv", ".tsv") else 3
    assert table.place(2) == f"{path}, line {line}"


def test_a_comma_is_text_in_a_tsv_file(tmp_path):
    (tmp_path / "rows.tsv").write_text("prompt\tchosen\na,b\tc\n")
    assert open_entry(tmp_path / "rows.tsv")["train"].rows == [{"prompt": "a,b", "chosen": "c"}]


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow_stream_and_arrow_file(tmp_path, form):
    stored = dataset(4).data.table
    make = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with make(str(tmp_path / "rows.arrow"), stored.schema) as writer:
        writer.write_table(stored)
    table = open_entry(tmp_path / "rows.arrow")["train"]
    assert list(table.rows) == pairs(4)
    assert table.place(3) == f"{tmp_path}/rows.arrow, row 4"


@pytest.mark.parametrize(
    "suffix, words",
    [
        (".jsonl.gz", "not readable as gzip"),
        (".jsonl.zst", "not readable as Zstandard"),
        (".parquet", "not readable as Parquet"),
        (".arrow", "not readable as Arrow"),
        (".txt", "files of type .txt cannot be read; give .json, .jsonl"),
        (".tar.gz", "files of type .tar.gz cannot be read"),
    ],
)
@pytest.mark.parametrize("content", [b"no such format", b""])
def test_a_damaged_file_is_named(tmp_path, suffix, words, content):
    if suffix == ".jsonl.zst":
        pytest.importorskip("zstandard")
    if not content and suffix.startswith(".jsonl"):
        pytest.skip("an empty file has no rows")
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x{suffix}: {words}"):
        open_entry(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_compressed_file_that_ends_early_is_refused(tmp_path, compression):
    path = tmp_path / f"rows.jsonl{compression}"
    write_file(path, pairs(3))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"not readable as .*Copy or compress it again"):
        open_entry(path)


def test_zst_without_its_package_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"rows.jsonl.zst: .*pip install zstandard"):
        open_entry(tmp_path / "rows.jsonl.zst")


# One JSON object that is no row, and what the message says.
OTHER_JSON = {
    "data": ({"version": 1, "data": pairs(2)}, 'one object with the rows under "data"'),
    "rows": ({"rows": pairs(2)}, 'one object with the rows under "rows"'),
    "columns": ({"prompt": ["a", "b"], "chosen": ["c", "d"]}, "one object of columns"),
    "pandas": ({"prompt": {"0": "a"}, "chosen": {"0": "c"}}, "one object of columns"),
}


@pytest.mark.parametrize("value, words", OTHER_JSON.values(), ids=OTHER_JSON)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_of_another_form_says_what_is_expected(tmp_path, value, words, indent):
    (tmp_path / "rows.json").write_text(json.dumps(value, indent=indent))
    with pytest.raises(ValueError) as caught:
        open_entry(tmp_path / "rows.json")
    for expected in (f"{tmp_path}/rows.json: ", words, "Expected is one list of rows"):
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "x"}]},
        {"prompt": [{"role": "user", "content": "x"}], "chosen": [{"role": "assistant"}]},
        {"prompt": "a", "chosen": "b"},
    ],
)
def test_one_row_in_a_json_file_is_a_row(tmp_path, row):
    (tmp_path / "rows.json").write_text(json.dumps(row))
    assert open_entry(tmp_path / "rows.json")["train"].rows == [row]


@pytest.mark.parametrize(
    "name", ["rows*.parquet", "x[1]/rows.parquet", "x[1]/r?ws.parquet", "{a,b}.parquet"]
)
def test_a_path_that_exists_is_not_read_as_a_pattern(tmp_path, name):
    path = tmp_path / name
    for other, begin in (
        ("rows2.parquet", 10),
        ("x1/rows.parquet", 20),
        ("x[1]/rows.parquet", 30),
        ("a.parquet", 40),
    ):
        write_parquet(tmp_path / other, 4, begin)
    write_parquet(path, 4)
    assert prompts(open_entry(path)["train"]) == names(0, 4)


def test_parquet_whose_first_group_is_empty(tmp_path):
    table = dataset(4).data.table
    with pyarrow.parquet.ParquetWriter(tmp_path / "rows.parquet", table.schema) as file:
        file.write_table(table.slice(0, 0))
        file.write_table(table)
    assert prompts(open_entry(tmp_path / "rows.parquet")["train"]) == names(0, 4)


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"--data_path .*rows.jsonl: neither a file nor a folder"):
        open_entry(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/rows.jsonl", "rows.jsonl", "a/b/c"])
def test_missing_path(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"--data_path {path}: no such file or folder, and not"):
        open_entry(path)


@pytest.mark.parametrize(
    "path", ["x" * 256, "/tmp/" + "x" * 256 + "/rows.jsonl", "a/" * 2500 + "b"]
)
def test_a_name_that_no_file_can_have_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"^--data_path .*: File name too long\. Give a path that exists, or a name such as",
    ):
        open_entry(path)


# Patterns and folders


def test_a_pattern_is_one_table_in_the_order_of_the_names(tmp_path):
    write_lines(tmp_path / "b.jsonl", ["", *pairs(2, 2)])
    write_lines(tmp_path / "a.jsonl", pairs(2))
    write_lines(tmp_path / "c.txt", ["x"])
    tables = open_entry(tmp_path / "*.jsonl")
    assert list(tables) == ["train"]
    table = tables["train"]
    assert prompts(table) == names(0, 4)
    places = [table.place(number) for number in range(4)]
    assert places == [
        f"{tmp_path}/{name}, line {line}"
        for name, line in (("a.jsonl", 1), ("a.jsonl", 2), ("b.jsonl", 2), ("b.jsonl", 3))
    ]
    assert str(table.fault(2, "bad")) == f"{tmp_path}/b.jsonl, line 2: bad."


def test_faults_of_a_pattern_name_their_file(tmp_path):
    write_lines(tmp_path / "a.jsonl", [*pairs(3), "{"])
    write_lines(tmp_path / "b.jsonl", ["{", *pairs(1)])
    (tmp_path / "c.json").write_text('[{"prompt": "p"}\n')
    table = open_entry(tmp_path / "*.json*")["train"]
    faults = sorted([table.fault(0, "first"), *reversed(table.faults)])
    assert [fault.place.removeprefix(f"{tmp_path}/") for fault in faults] == [
        "a.jsonl, line 1",
        "a.jsonl, line 4",
        "b.jsonl, line 1",
        "c.json, line 2",
    ]
    assert table.lost_after == f"{tmp_path}/c.json, line 2"


def test_arrow_tables_of_a_pattern_are_joined(tmp_path):
    write_parquet(tmp_path / "a.parquet", 2)
    dataset(0).to_parquet(tmp_path / "b.parquet")
    write_parquet(tmp_path / "c.parquet", 2, 2)
    table = open_entry(tmp_path / "?.parquet")["train"]
    assert isinstance(table.rows, datasets.Dataset)
    assert prompts(table) == names(0, 4)
    assert table.place(1) == f"{tmp_path}/a.parquet, row 2"
    assert table.place(2) == f"{tmp_path}/c.parquet, row 1"


def test_a_pattern_over_other_files(tmp_path):
    write_parquet(tmp_path / "a.parquet", 2)
    with pytest.raises(ValueError, match=r"\*.csv: no such file, and as a pattern it matches none"):
        open_entry(tmp_path / "*.csv")
    datasets.Dataset.from_list([{"prompt": 3}]).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"\*: its 2 files have different columns"):
        open_entry(tmp_path / "*")
    (tmp_path / "b.parquet").unlink()
    write_lines(tmp_path / "b.jsonl", pairs(1))
    with pytest.raises(ValueError, match=r"\*: its 2 files are of different kinds"):
        open_entry(tmp_path / "*")


@pytest.mark.parametrize("name", ["eval", "test", "validation"])
def test_folder_of_files(tmp_path, name):
    write_lines(tmp_path / "train.jsonl", pairs(3))
    write_lines(tmp_path / "config.json", ["{}"])
    with open(tmp_path / f"{name}.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen"], ["q", "a"]])
    tables = open_entry(tmp_path)
    assert prompts(tables["train"]) == names(0, 3)
    assert prompts(tables["eval"]) == ["q"]
    write_lines(tmp_path / "train.json", pairs(3))
    with pytest.raises(ValueError, match="train.json and train.jsonl are both its train part"):
        open_entry(tmp_path)


@pytest.mark.parametrize("file", [None, "rows.jsonl", "test.jsonl", "train.txt"])
def test_folder_without_data(tmp_path, file):
    if file:
        write_lines(tmp_path / file, pairs(1))
    with pytest.raises(ValueError, match=r"no train\.\* in this folder"):
        open_entry(tmp_path)


@pytest.mark.parametrize("inner", ["", "data"])
def test_snapshot_of_the_hub(tmp_path, inner):
    folder = tmp_path / inner
    write_parquet(folder / "train-00000-of-00002.parquet", 2)
    write_parquet(folder / "train-00001-of-00002.parquet", 2, 2)
    write_parquet(folder / "test-00000-of-00001.parquet", 1, 9)
    write_parquet(folder / "validation-00000-of-00001.parquet", 1, 10)
    (tmp_path / "README.md").write_text("---\n---\n")
    (tmp_path / ".cache").mkdir()
    tables = open_entry(tmp_path)
    assert prompts(tables["train"]) == names(0, 4)
    assert tables["train"].place(2) == f"{folder}/train-00001-of-00002.parquet, row 1"
    assert prompts(tables["eval"]) == ["p9"]
    tables = open_entry(f"{tmp_path}@validation")
    assert list(tables) == ["train"]
    assert prompts(tables["train"]) == ["p10"]
    (folder / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"1 of the 2 files of its train part are here; .* 0\."):
        open_entry(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        ["train-0.jsonl", "train-1.jsonl.gz"],
        ["train_0001.jsonl", "train_0002.jsonl"],
        ["train_00000_of_00002.jsonl", "train_00001_of_00002.jsonl"],
        ["train-00000-of-00002-0a1b.jsonl", "train-00001-of-00002-2c3d.jsonl"],
        ["train1.jsonl", "train2.jsonl"],
        ["train-a.jsonl", "train.b.jsonl"],
        ["train/x.jsonl", "train/y.jsonl.gz"],
        ["data/train/x.jsonl", "data/train/y.jsonl"],
    ],
)
def test_numbered_files_and_folders_are_one_part(tmp_path, files):
    for file, begin in zip(files, (0, 2), strict=True):
        write_lines(tmp_path / file, pairs(2, begin))
        if file.endswith(".gz"):
            (tmp_path / file).write_bytes(gzip.compress((tmp_path / file).read_bytes()))
    table = open_entry(tmp_path)["train"]
    assert prompts(table) == names(0, 4)
    assert table.place(3) == f"{tmp_path}/{files[1]}, line 2"


def test_folders_of_parts(tmp_path):
    write_lines(tmp_path / "train" / "rows.jsonl", pairs(2))
    write_lines(tmp_path / "train" / ".rows.jsonl", pairs(2))  # hidden
    dataset(3).save_to_disk(tmp_path / "test")  # its .json files are not rows
    tables = open_entry(tmp_path)
    assert [len(tables[part].rows) for part in ("train", "eval")] == [2, 3]
    assert not tables["eval"].faults
    (tmp_path / "train" / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match=r"train: no \.json, .* file in it"):
        open_entry(tmp_path)


@pytest.mark.parametrize("other", ["train-0.jsonl", "train/rows.jsonl", "train.jsonl.gz"])
def test_files_that_may_repeat_the_rows_are_refused(tmp_path, other):
    write_lines(tmp_path / "train.jsonl", pairs(2))
    write_lines(tmp_path / other, pairs(2))
    with pytest.raises(ValueError, match=r"are both its train part; keep one"):
        open_entry(tmp_path)


def test_one_numbered_file_in_two_formats_is_refused(tmp_path):
    for name in ("train-0.jsonl", "train-1.json", "train-1.jsonl"):
        write_lines(tmp_path / name, pairs(2))
    with pytest.raises(ValueError, match=r"train-1.json and train-1.jsonl are both"):
        open_entry(tmp_path)


# Formats that a stored table may keep: another kind of table, or hidden columns.
FORMATS = {
    "pandas": {"type": "pandas"},
    "arrow": {"type": "arrow"},
    "numpy": {"type": "numpy"},
    "torch": {"type": "torch", "columns": ["gold"]},
    "some columns": {"columns": ["prompt"]},
}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("parts", [False, True])
def test_the_format_of_a_stored_table_does_not_matter(tmp_path, form, parts):
    rows = [{**row, "gold": number} for number, row in enumerate(pairs(4))]
    stored = datasets.Dataset.from_list(rows).with_format(**form)
    if parts:
        stored = datasets.DatasetDict({"train": stored, "test": stored})
    stored.save_to_disk(tmp_path / "set")
    tables = open_entry(tmp_path / "set")
    assert list(tables) == (["train", "eval"] if parts else ["train"])
    for table in tables.values():
        assert list(table.rows) == rows
        assert all(type(row["gold"]) is int for row in table.rows)


@pytest.mark.parametrize(
    "name, text", [("state.json", "{}"), ("state.json", "["), ("dataset_info.json", "{")]
)
def test_damaged_folder_of_save_to_disk(tmp_path, name, text):
    dataset(4).save_to_disk(tmp_path / "set")
    (tmp_path / "set" / name).write_text(text)
    with pytest.raises(ValueError, match="set: not readable as a folder of datasets.save_to_disk"):
        open_entry(tmp_path / "set")


# Parts

ULTRAFEEDBACK = {"train_prefs": 10, "test_prefs": 20, "train_sft": 30, "test_sft": 40}


@pytest.mark.parametrize("form", ["save_to_disk", "files"])
@pytest.mark.parametrize(
    "step, parts", [(1, ("p30", "p40")), (2, ("p10", "p20")), (3, ("p10", "p20"))]
)
def test_the_part_depends_on_the_step(tmp_path, caplog, form, step, parts):
    if form == "files":
        for name, begin in ULTRAFEEDBACK.items():
            write_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet", 2, begin)
    else:
        save_parts(tmp_path, **ULTRAFEEDBACK)
    with caplog.at_level(logging.INFO):
        tables = open_entry(tmp_path, prefer=PREFERRED[step])
    assert (tables["train"].rows[0]["prompt"], tables["eval"].rows[0]["prompt"]) == parts
    assert f"{tmp_path}: training on part train_{'sft' if step == 1 else 'prefs'}, " in caplog.text


def test_gen_is_preferred_by_step_3(tmp_path):
    save_parts(tmp_path, **ULTRAFEEDBACK, train_gen=50)
    tables = open_entry(tmp_path, prefer=PREFERRED[3])
    assert prompts(tables["train"]) == names(50, 52)
    assert "eval" not in tables


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_single_training_part_serves_every_step(tmp_path, step):
    save_parts(tmp_path / "alone", train_prefs=0)
    tables = open_entry(tmp_path / "alone", prefer=PREFERRED[step])
    assert prompts(tables["train"]) == names(0, 2)
    save_parts(tmp_path / "two", train_prefs=0, test_prefs=5)
    tables = open_entry(tmp_path / "two", prefer=PREFERRED[step])
    assert prompts(tables["train"]) == names(0, 2)
    assert prompts(tables["eval"]) == names(5, 7)


def test_train_takes_precedence_over_the_preferred_part(tmp_path):
    save_parts(tmp_path, train_sft=0, train=2, test=4, test_sft=6)
    tables = open_entry(tmp_path, prefer=("sft",))
    assert [prompts(table)[0] for table in tables.values()] == ["p2", "p4"]


@pytest.mark.parametrize("form", ["save_to_disk", "files"])
def test_parts_that_do_not_fit_are_all_named(tmp_path, form):
    if form == "files":
        write_lines(tmp_path / "train_a.jsonl", pairs(2))
        write_lines(tmp_path / "train_b.jsonl", pairs(2))
    else:
        save_parts(tmp_path, train_a=0, train_b=2)
    with pytest.raises(ValueError) as caught:
        open_entry(tmp_path, prefer=PREFERRED[2])
    assert str(caught.value) == (
        f"{tmp_path}: its parts are train_a, train_b, and none is called train. Add the part to "
        f"train on to the entry, such as {tmp_path}@train_a, or give --dataset_split."
    )
    assert len(open_entry(f"{tmp_path}@train_b")["train"].rows) == 2
    assert len(open_entry(tmp_path, split="train_b")["train"].rows) == 2
    with pytest.raises(ValueError, match=r"its parts are train_a, train_b, and none is called x\."):
        open_entry(f"{tmp_path}@x")
    with pytest.raises(ValueError, match=r"train\[:2\] is a slice, which only a name of the hub"):
        open_entry(f"{tmp_path}@train[:2]")


def test_a_named_part_keeps_its_evaluation_part(tmp_path):
    save_parts(tmp_path, **ULTRAFEEDBACK)
    tables = open_entry(f"{tmp_path}@train_sft", prefer=PREFERRED[2])
    assert [prompts(table)[0] for table in tables.values()] == ["p30", "p40"]
    # Training on an evaluation part: rows are held out from it, and not from another such part.
    tables = open_entry(f"{tmp_path}@test_sft")
    assert [prompts(table)[0] for table in tables.values()] == ["p40"]


# Suffixes of an entry


@pytest.mark.parametrize(
    "text, entry",
    [
        ("owner/name", Entry("owner/name")),
        ("owner/name:main", Entry("owner/name", "main")),
        ("owner/name@train_sft", Entry("owner/name", None, "train_sft")),
        ("name:20220301.en@train", Entry("name", "20220301.en", "train")),
        ("owner/name@train[:10%]", Entry("owner/name", None, "train[:10%]")),
        ("owner/name@train+test", Entry("owner/name", None, "train+test")),
        ("owner/name@[12].jsonl", Entry("owner/name@[12].jsonl")),
        ("owner/name@1.jsonl", Entry("owner/name@1.jsonl")),
        ("./name@train", Entry("./name@train")),
        ("a/b/c@train", Entry("a/b/c@train")),
    ],
)
def test_suffix_of_an_entry(tmp_path, monkeypatch, text, entry):
    monkeypatch.chdir(tmp_path)
    assert parse_entry(text) == entry


def test_a_path_that_exists_has_no_suffix(tmp_path):
    write_lines(tmp_path / "set" / "train.jsonl", pairs(2, 10))
    write_lines(tmp_path / "set" / "main" / "train.jsonl", pairs(2, 20))
    for name in ("set@train", "set:main"):
        write_lines(tmp_path / name / "train.jsonl", pairs(2))
        assert prompts(open_entry(tmp_path / name)["train"]) == names(0, 2)


def test_a_suffix_that_a_path_cannot_have(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", pairs(2))
    dataset(2).save_to_disk(tmp_path / "set")
    for entry in (f"{path}@train", f"{tmp_path}/set@train"):
        with pytest.raises(ValueError, match=r"is one table without parts. Leave @train out"):
            open_entry(entry)
    for entry in (f"{path}:main", f"{tmp_path}/set:main"):
        with pytest.raises(ValueError, match=r"has no folder main. Leave :main out"):
            open_entry(entry)
    # As defaults for all entries, both are for those that have them.
    for entry in (path, tmp_path / "set"):
        assert len(open_entry(entry, config="main", split="train")["train"].rows) == 2


def test_configuration_of_a_snapshot_is_its_folder(tmp_path):
    write_parquet(tmp_path / "main" / "train-00000-of-00001.parquet", 2)
    for tables in (open_entry(f"{tmp_path}:main"), open_entry(tmp_path, config="main")):
        assert prompts(tables["train"]) == names(0, 2)
    with pytest.raises(ValueError, match=rf"but in its folders main. Give .* {tmp_path}/main\."):
        open_entry(tmp_path)


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Replace the hub by one dataset of all parts; the value lists what was asked for."""
    asked = []

    def load_dataset(name, config=None, *, split=None, cache_dir=None):
        asked.append((name, config, split))
        if split:
            return dataset(2, 90)
        return datasets.DatasetDict({name: dataset(2, b) for name, b in ULTRAFEEDBACK.items()})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    "text, asked, first",
    [
        ("owner/name", ("owner/name", None, None), ["p10", "p20"]),
        ("owner/name:main@train_sft", ("owner/name", "main", None), ["p30", "p40"]),
        ("owner/name@train[:10%]", ("owner/name", None, "train[:10%]"), ["p90"]),
    ],
)
def test_configuration_and_split_of_a_hub_name(hub, text, asked, first):
    tables = open_entry(text, prefer=PREFERRED[2])
    assert hub == [asked]
    assert [prompts(table)[0] for table in tables.values()] == first


def test_place_of_a_slice(hub):
    table = open_entry("owner/name@train[:10%]")["train"]
    assert table.place(1) == "owner/name (train[:10%]), row 2"


def test_hub_set_without_its_configuration(hub, monkeypatch):
    def load_dataset(*args, **options):
        raise ValueError("Config name is missing. Please pick one among the available configs: a")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"available configs: a.*Add one .*owner/name:CONFIG"):
        open_entry("owner/name")


def test_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach it")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"--data_path Dahoas/rm-static: .*Couldn't reach it.*save_to_disk"
    ):
        open_entry("Dahoas/rm-static")
