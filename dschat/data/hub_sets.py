r"""The hub datasets that are known by name: their repository, and how their rows are read.

Question-and-answer sets get the form of the Dahoas sets, "\n\nHuman: ...\n\nAssistant:" and
" answer", so that a blend has one form. If a row has no usable answer, its row function raises
ValueError (or another error over a null field). Users cannot fix published sets, so such rows are
left out and counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from dschat.data.forms import CITATION, Reading, read_row, read_rows
from dschat.data.row import Row, add_leading_space, validate_pair
from dschat.data.text_checks import validate_text

# From a raw row to its row.
RowFunction = Callable[[dict], Row]


@dataclass(frozen=True)
class HubSet:
    """A named dataset; without a row function, its rows are read by their form."""

    row_function: RowFunction | None = None
    repository: str | None = None  # if it differs from the name
    config: str | None = None

    @property
    def name_of_function(self) -> str:
        """Name of the row function, the same in every process."""
        return getattr(self.row_function, "__qualname__", "")

    def read(self, raw: dict, reading: Reading) -> list[Row]:
        """Read a raw row as one or more rows."""
        if self.row_function is None:
            return read_rows(raw, reading)
        return [self.row_function(raw)]


def question_row(question: object, chosen: object, rejected: object = None) -> Row:
    """Build a row in Human/Assistant form from a question and its answers."""
    prompt = f"\n\nHuman: {validate_text(question, 'question').strip()}\n\nAssistant:"
    chosen = " " + validate_text(chosen, "answer").strip()
    if rejected is not None:
        rejected = " " + validate_text(rejected, "rejected answer").strip()
    return validate_pair(Row(prompt, chosen, rejected))


def local_json_row(raw: dict) -> Row:
    """Build a row of DeepSpeed-Chat's local file, with a space between prompt and answer."""
    row = read_row(raw)
    return replace(
        row,
        chosen=add_leading_space(row.chosen),
        rejected=add_leading_space(row.rejected),
    )


def _synthetic_instruct(raw: dict) -> Row:
    return question_row(raw["prompt"], raw["chosen"], raw["rejected"])


def _reward_datasets(raw: dict) -> Row:
    # The prompt lacks the closing "Assistant:"; both answers begin with it instead.
    prompt = validate_text(raw["prompt"], "prompt").rstrip() + "\n\nAssistant:"
    chosen = validate_text(raw["chosen"].split("Assistant:")[-1], "chosen")
    rejected = validate_text(raw["rejected"].split("Assistant:")[-1], "rejected")
    return validate_pair(Row(prompt, " " + chosen.strip(), " " + rejected.strip()))


def _webgpt(raw: dict) -> Row:
    answers = [CITATION.sub("", raw["answer_0"]), CITATION.sub("", raw["answer_1"])]
    if raw["score_0"] < raw["score_1"]:
        answers.reverse()
    if raw["score_0"] == raw["score_1"]:  # a tie prefers neither
        answers[1] = None
    return question_row(raw["question"]["full_text"], *answers)


def _shp(raw: dict) -> Row:
    answers = [raw["human_ref_A"], raw["human_ref_B"]]
    if int(raw["labels"]) != 1:
        answers.reverse()
    return question_row(raw["history"], *answers)


def _vicuna(raw: dict) -> Row:
    prompt = validate_text(raw["prompt"], "prompt")
    prompt = prompt.replace("USER", "Human").replace("ASSISTANT", "Assistant")
    return Row(prompt, " " + validate_text(raw["label"], "label").strip())


def _zhihu(raw: dict) -> Row:
    return question_row(raw["INSTRUCTION"], raw["RESPONSE"])


def _miracl(raw: dict) -> Row:
    negative = raw["negative_passages"][0]["text"] if raw["negative_passages"] else None
    return question_row(raw["query"], raw["positive_passages"][0]["text"], negative)


def _hc3(raw: dict) -> Row:
    return question_row(raw["question"], raw["human_answers"][0])


def _mkqa(language: str) -> RowFunction:
    def row(raw: dict) -> Row:
        return question_row(raw["queries"][language], raw["answers"][language][0]["text"])

    return row


def _jaquad_question(raw: dict) -> Row:
    return question_row(raw["question"], raw["sentence"])


def _jaquad_questions(raw: dict) -> Row:
    return question_row(raw["questions"][0], raw["paragraph"])


HUB_SETS = {
    "Dahoas/rm-static": HubSet(),
    "Dahoas/full-hh-rlhf": HubSet(),
    "Dahoas/synthetic-instruct-gptj-pairwise": HubSet(_synthetic_instruct),
    "yitingxie/rlhf-reward-datasets": HubSet(_reward_datasets),
    "openai/webgpt_comparisons": HubSet(_webgpt),
    "stanfordnlp/SHP": HubSet(_shp),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": HubSet(_vicuna),
    "wangrui6/Zhihu-KOL": HubSet(_zhihu),
    "Cohere/miracl-zh-queries-22-12": HubSet(_miracl),
    "Cohere/miracl-ja-queries-22-12": HubSet(_miracl),
    "Hello-SimpleAI/HC3-Chinese": HubSet(_hc3, config="all"),
    "mkqa-Chinese": HubSet(_mkqa("zh_cn"), repository="apple/mkqa"),
    "mkqa-Japanese": HubSet(_mkqa("ja"), repository="apple/mkqa"),
    "lmqg/qg_jaquad": HubSet(_jaquad_question),
    "lmqg/qag_jaquad": HubSet(_jaquad_questions),
}
