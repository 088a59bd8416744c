"""Graders: rewards that step 3's --reward_fn takes by name.

A grader is called like any function of --reward_fn: prompts, answers, and the rows' other columns
as lists. It returns one score per answer; None: it does not apply.
"""

import json
import re
from fractions import Fraction
from typing import Any

from dschat.rewards.numbers import last_number, same_number
from dschat.rewards.references import references
from dschat.runtime.paths import user_path

Scores = list[float | None]


class ReferenceGrader:
    """A grader that compares each answer with the reference of its row."""

    def __init__(self, column: str = ""):
        """Set the column of the reference; see ``references``."""
        self.column = column

    def __call__(self, prompts: list[str], answers: list[str], **columns) -> Scores:
        """Return one score per answer; None for a row whose reference cannot be used."""
        wanted = references(columns, self.column)
        return [
            self._score(answer, reference)
            for answer, reference in zip(answers, wanted, strict=True)
        ]

    def _score(self, answer: str, reference: object) -> float | None:
        raise NotImplementedError


class ExactMatch(ReferenceGrader):
    """1 if the answer is the reference, apart from the amount of white space; else 0.

    None if there is no reference.
    """

    def __init__(self, column: str = "", ignore_case: bool = False):
        """Set the column of the reference, and whether upper and lower case are the same."""
        super().__init__(column)
        self.ignore_case = ignore_case

    def _score(self, answer: str, reference: object) -> float | None:
        if reference is None:
            return None
        return float(self._plain(answer) == self._plain(str(reference)))

    def _plain(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text


class NumericMatch(ReferenceGrader):
    """1 if the last number of the answer is that of the reference, else 0; see ``last_number``.

    None if the reference has no number.
    """

    def __init__(self, column: str = "", tolerance: float = 0.0):
        """Set the column of the reference, and the largest difference of equal numbers."""
        if tolerance < 0:
            raise ValueError(f"tolerance is {tolerance}; it must be 0 or more")
        super().__init__(column)
        self.tolerance = Fraction(str(tolerance))

    def _score(self, answer: str, reference: object) -> float | None:
        expected = last_number(str(reference))
        if expected is None:
            return None
        found = last_number(answer)
        return float(found is not None and same_number(found, expected, tolerance=self.tolerance))


class RegexMatch:
    """1 if a regular expression matches the answer: a check of its format."""

    def __init__(self, pattern: str, whole: bool = False):
        """Compile `pattern`, in which a dot also matches a line break.

        Args:
            pattern: in Python's syntax.
            whole: the pattern must match the whole answer, without surrounding white space;
                otherwise any part.
        """
        try:
            compiled = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
        self._match = compiled.fullmatch if whole else compiled.search

    def __call__(self, prompts: list[str], answers: list[str], **columns) -> Scores:
        """Return 1 or 0 per answer."""
        return [float(self._match(answer.strip()) is not None) for answer in answers]


class LengthPenalty:
    """A penalty for words over a limit: 0 up to the limit, then falling linearly to -1."""

    def __init__(self, limit: int, buffer: int = 0):
        """Set where the penalty begins and ends.

        Args:
            limit: the most words without a penalty.
            buffer: words over the limit at which the penalty is -1; 0: as many as `limit`.
        """
        if limit < 1 or buffer < 0:
            raise ValueError(
                f"limit is {limit} and buffer {buffer}; they must be at least 1 and 0 words"
            )
        self.limit = limit
        self.buffer = buffer or limit

    def __call__(self, prompts: list[str], answers: list[str], **columns) -> Scores:
        """Return a number from -1 to 0 per answer."""
        excess = [max(0, len(answer.split()) - self.limit) for answer in answers]
        return [-min(1.0, words / self.buffer) for words in excess]


class ValidJson:
    """1 if the answer is valid JSON, alone or in a fenced block of code."""

    def __init__(self, keys: list[str] | tuple[str, ...] = ()):
        """Set the keys that the answer, then an object, must have; it may have more."""
        if isinstance(keys, str):
            raise ValueError(f"keys is the text {keys!r}; give a list: keys=[{keys!r}]")
        self.keys = set(keys)

    def __call__(self, prompts: list[str], answers: list[str], **columns) -> Scores:
        """Return 1 or 0 per answer."""
        return [float(self._is_valid(answer)) for answer in answers]

    def _is_valid(self, answer: str) -> bool:
        try:
            found = read_json(answer)
        except (ValueError, RecursionError):  # no JSON, or nested too deeply to be read
            return False
        return not self.keys or (isinstance(found, dict) and self.keys <= set(found))


class JsonSchema:
    """1 if the answer is JSON, alone or in a fenced block of code, that meets a JSON schema.

    The library jsonschema compares them, and fetches nothing. None for a row without a schema.
    """

    def __init__(self, file: str = "", column: str = ""):
        """Read the schema.

        Args:
            file: a file with the schema of all answers.
            column: in its place, the column with the schema of each row: an object, or its text.
        """
        try:
            import jsonschema
            import referencing
        except ImportError as error:
            raise ValueError(
                "json_schema needs jsonschema: pip install 'dschat[schema]' (in a copy of the "
                "repository: pip install -e '.[schema]')"
            ) from error
        if bool(file) == bool(column):
            raise ValueError("give either file or column, with the schema")
        self._library = jsonschema
        self._no_other_schemas = referencing.Registry()
        self.column = column
        self._schema = self._validator(_text_of(file)) if file else None

    def __call__(self, prompts: list[str], answers: list[str], **columns) -> Scores:
        """Return 1, 0 or None per answer.

        Raises:
            ValueError: the schema of a row is none.
        """
        if self._schema is not None:
            return [self._score(answer, self._schema) for answer in answers]
        schemas = references(columns, self.column)
        return [
            None if schema is None else self._score(answer, self._validator(schema))
            for answer, schema in zip(answers, schemas, strict=True)
        ]

    def _validator(self, schema: object) -> Any:
        """Return the validator of a schema, which may be the text of one."""
        try:
            read = json.loads(schema) if isinstance(schema, str) else schema
            kind = self._library.validators.validator_for(read)
            kind.check_schema(read)
        except (ValueError, self._library.SchemaError) as error:
            raise ValueError(f"{schema!r:.200} is no JSON schema: {error!s:.200}") from error
        return kind(read, registry=self._no_other_schemas)

    def _score(self, answer: str, validator: Any) -> float:
        try:
            return float(validator.is_valid(read_json(answer)))
        except (ValueError, RecursionError):
            return 0.0


def _text_of(file: str) -> str:
    try:
        return user_path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def read_json(answer: str) -> Any:
    """Return the JSON of an answer, alone or in a fenced block of code.

    Raises:
        ValueError: it is no JSON.
        RecursionError: it is nested too deeply.
    """
    text = answer.strip()
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", text, re.DOTALL)
    return json.loads(fenced[1] if fenced else text, parse_constant=_refuse)


def _refuse(name: str) -> None:
    """Refuse NaN and infinities, which Python reads and JSON does not have."""
    raise ValueError(f"{name} is no JSON")


class MathMatch(ReferenceGrader):
    """1 if the last mathematical expression of the answer equals that of the reference.

    The library math-verify (Hugging Face) finds and compares them: LaTeX, also in a box, and plain
    numbers and formulas. None if the reference cannot be read.
    """

    def __init__(self, column: str = "", timeout_s: int = 5):
        """Set the column of the reference, and the seconds to read or to compare expressions."""
        try:
            import math_verify
        except ImportError as error:
            raise ValueError(
                "math_match needs math-verify: pip install 'dschat[math]' (in a copy of the "
                "repository: pip install -e '.[math]')"
            ) from error
        super().__init__(column)
        self.timeout_s = timeout_s
        self._library = math_verify

    def _score(self, answer: str, reference: object) -> float | None:
        if reference is None:
            return None
        expected = self._read(str(reference))
        if not expected:
            expected = self._read(f"${reference}$")  # LaTeX without its dollars
        if not expected:
            return None
        found = self._read(answer)
        return float(self._library.verify(expected, found, timeout_seconds=self.timeout_s))

    def _read(self, text: str) -> list:
        return self._library.parse(text, parsing_timeout=self.timeout_s)
