"""run.json, by which later programs know how a model was trained."""

import json
from pathlib import Path

from dschat.runtime.paths import user_path

RECORD = "run.json"
TEXT_FORMATS = ("plain", "human_assistant", "chat")


def recorded_format(model_path: str, asked: str) -> str:
    """Return the text format of a model's training data, if `asked` is "auto" and it is known.

    Args:
        model_path: folder or hub name of the model. Its run.json is in the folder or, as for the
            models of step 3 and for adapters, in the one above.
        asked: the value of --prompt_format.

    Returns:
        "plain", "human_assistant" or "chat"; `asked` if it is not "auto" or nothing is known.
    """
    if asked != "auto":
        return asked
    folder = user_path(model_path)
    for file in (folder / RECORD, folder.parent / RECORD):
        found = _text_format(file)
        if found in TEXT_FORMATS:
            return found
    return asked


def _text_format(file: Path) -> object:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record.get("text_format") if isinstance(record, dict) else None
