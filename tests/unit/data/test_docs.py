"""docs/data.md against the code that it describes."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from dschat.config.sft import SFTData
from dschat.data.forms import FORMS, find_form, read_row
from dschat.data.readers import BARE_TEXT

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = dict(
    re.findall(r"^\| ([\w ]+) \| .* \| `(\{.*\}|\".*\")` \|$", PAGE, flags=re.MULTILINE)
)


def test_the_table_of_forms_is_complete_and_in_order():
    assert list(EXAMPLES) == [form.name for form in FORMS]


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_is_read_by_its_form(name):
    raw = json.loads(EXAMPLES[name])
    if isinstance(raw, str):
        raw = {BARE_TEXT: raw}
    assert find_form(raw).name == name
    assert read_row(raw).chosen


def test_every_data_flag_is_described():
    names = [field.name for field in dataclasses.fields(SFTData)]
    assert [name for name in names if f"--{name}" not in PAGE] == []
