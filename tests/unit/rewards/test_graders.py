"""Graders: what they give answers that were graded by hand."""

import json
import sys
from fractions import Fraction

import pytest

from dschat.rewards.numbers import last_number
from dschat.rewards.references import MissingColumn
from dschat.rewards.registry import GRADERS, load_grader


def grade(spec: str, *answers: str, **columns) -> list:
    return load_grader(spec)(["prompt"] * len(answers), list(answers), **columns)


@pytest.mark.parametrize(
    "text, value, is_percentage",
    [
        ("5 apples and 7 pears.", 7, False),
        ("1 + 1 = 3\n#### 1,234", 1234, False),
        ("#### 2 #### 5 dollars", 5, False),
        ("costs $1,234,567.50.", Fraction("1234567.5"), False),
        ("1,2345", 2345, False),  # no groups of three: two numbers
        ("x is -5", -5, False),
        ("x is \u22125", -5, False),
        ("10-5", 5, False),  # subtracts
        ("5 - 3", 3, False),
        ("-$3", -3, False),
        ("of .5", Fraction(1, 2), False),
        ("3/4 of it", Fraction(3, 4), False),
        ("-1 / 2", Fraction(-1, 2), False),
        ("50%", 50, True),
        ("12.5 \\%", Fraction(25, 2), True),
        ("1.5e3", 1500, False),
        ("2E-2", Fraction(1, 50), False),
    ],
)
def test_the_last_number_of_a_text(text, value, is_percentage):
    number = last_number(text)
    assert (number.value, number.is_percentage) == (value, is_percentage)


@pytest.mark.parametrize("text", ["", "none", "7 ####", "1/0", "9" * 5000, "1/" + "9" * 5000])
def test_texts_without_a_readable_number(text):
    assert last_number(text) is None


@pytest.mark.parametrize(
    "answer, reference, score",
    [
        ("1,000", 1000, 1.0),
        ("0.1", 0.1, 1.0),
        ("1/3", "2/6", 1.0),
        ("0.333", "1/3", 0.0),
        ("50%", "50", 1.0),
        ("50%", 0.5, 1.0),
        ("0.5", "50%", 1.0),
        ("50%", "5000%", 0.0),
        ("5000%", "50%", 0.0),
        ("0.5", "50", 0.0),
        ("0.5%", 50, 0.0),
        ("no idea", "3", 0.0),
        ("3", "So 1 + 2 is\n#### 3", 1.0),
        ("3", None, None),
        ("3", "unknown", None),
    ],
)
def test_numeric_match(answer, reference, score):
    assert grade("numeric_match", answer, solution=[reference]) == [score]


def test_numeric_match_within_a_tolerance():
    spec = "numeric_match(tolerance=0.01)"
    assert grade(spec, "0.33", "0.35", "33.5%", target=["1/3"] * 3) == [1.0, 0.0, 1.0]


def test_exact_match_ignores_white_space_and_case_if_asked():
    columns = {"target": ["New York", "New York", "New York", None, 7]}
    answers = (" New\n York ", "new york", "York", "x", "7")
    assert grade("exact_match", *answers, **columns) == [1.0, 0.0, 0.0, None, 1.0]
    assert grade("exact_match(ignore_case=True)", *answers, **columns)[:3] == [1.0, 1.0, 0.0]


def test_references_come_from_the_named_column_or_the_first_known_one():
    columns = {"chosen": ["1"], "solution": ["2"], "result": ["3"]}
    assert grade("exact_match", "2", **columns) == [1.0]
    assert grade("exact_match(column='result')", "3", **columns) == [1.0]
    with pytest.raises(MissingColumn, match="need a column gold .* have chosen, result, solution"):
        grade("exact_match(column='gold')", "3", **columns)
    with pytest.raises(MissingColumn, match="target or solution or .* have none"):
        grade("numeric_match", "3")


def test_regex_match_anywhere_or_of_the_whole_answer():
    pattern = "<think>.*</think>"
    answers = ("a <think>b\nc</think> d", " <think></think>\n", "<think>")
    assert grade(f"regex_match(pattern='{pattern}')", *answers) == [1.0, 1.0, 0.0]
    assert grade(f"regex_match(pattern='{pattern}', whole=True)", *answers) == [0.0, 1.0, 0.0]


def test_length_penalty_falls_from_the_limit_on():
    answers = ("", "a b c d", "a b c d e", "a " * 6, "a " * 100)
    assert grade("length_penalty(limit=4, buffer=2)", *answers) == [0, 0, -0.5, -1, -1]
    assert grade("length_penalty(limit=4)", *answers) == [0, 0, -0.25, -0.5, -1]


@pytest.mark.parametrize(
    "answer, valid, has_keys",
    [
        (' {"a": 1, "b": [], "c": null} ', 1, 1),
        ('```json\n{"a": 1, "b": 2}\n```', 1, 1),
        ("```\n[1, 2]\n```", 1, 0),
        ('{"a": 1}', 1, 0),
        ('["a", "b"]', 1, 0),
        ('{"a": NaN, "b": 1}', 0, 0),
        ('{"a": 1, "b": 2} and more', 0, 0),
        ("", 0, 0),
        ("[" * 100_000, 0, 0),
        ("9" * 5000, 0, 0),
    ],
)
def test_valid_json(answer, valid, has_keys):
    assert grade("valid_json", answer) == [valid]
    assert grade("valid_json(keys=['a', 'b'])", answer) == [has_keys]


def test_math_match_compares_expressions():
    answers = ("so \\boxed{\\frac{1}{2}}", "it is 0.5", "$x^2+2x+1$", "3", "no idea", "3", "2")
    wanted = ["0.5", "\\frac{1}{2}", "$(x+1)^2$", "$\\sqrt{9}$", "4", None, 3]
    assert grade("math_match", *answers, target=wanted) == [1, 1, 1, 1, 0, None, 0]


def test_math_match_says_how_to_install_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"pip install 'dschat\[math\]'"):
        load_grader("math_match")


@pytest.mark.parametrize(
    "spec, words",
    [
        ("nothing", ["no grader nothing", *GRADERS]),
        ("length_penalty", ["limit"]),
        ("length_penalty(limit=0)", ["limit is 0"]),
        ("length_penalty(limit='many')", ["length_penalty does not take"]),
        ("length_penalty(200)", ["length_penalty(limit=200)"]),
        ("length_penalty(limit=200", ["length_penalty(limit=200)"]),
        ("length_penalty(limit=print())", ["length_penalty(limit=200)"]),
        ("exact_match(colum='a')", ["colum"]),
        ("numeric_match(tolerance=-1)", ["tolerance is -1"]),
        ("regex_match(pattern='(')", ["no regular expression"]),
        ("valid_json(keys='a')", ["keys=['a']"]),
    ],
)
def test_wrong_graders_and_options_are_refused(spec, words):
    with pytest.raises(ValueError) as caught:
        load_grader(spec)
    assert all(word in str(caught.value) for word in words)


SCHEMA = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}


def test_answers_meet_a_json_schema(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    answers = ['{"age": 3}', '```json\n{"age": 3, "b": 1}\n```', '{"age": "3"}', "[]", "no"]
    assert grade(f"json_schema(file='{file}')", *answers) == [1.0, 1.0, 0.0, 0.0, 0.0]
    rows = [SCHEMA, json.dumps(SCHEMA), None, {"type": "array"}, True]
    assert grade("json_schema(column='form')", *answers, form=rows) == [1.0, 1.0, None, 1.0, 0.0]


def test_a_bad_json_schema_is_refused_and_no_other_is_fetched(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text('{"type": "thing"}')
    for spec, words in (
        (f"json_schema(file='{file}')", "no JSON schema"),
        ("json_schema(file='/no/such/file')", "cannot be read"),
        ("json_schema()", "either file or column"),
    ):
        with pytest.raises(ValueError, match=words):
            load_grader(spec)
    elsewhere = {"$ref": "http://127.0.0.1:9/schema.json"}
    with pytest.raises(Exception, match="Unresolvable"):
        grade("json_schema(column='form')", "{}", form=[elsewhere])
