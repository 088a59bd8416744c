"""README.md beside a saved model: a model card in the format of the Hugging Face hub."""

import json
import re
from pathlib import Path

from dschat.report.charts import number_text
from dschat.report.page import RESULTS
from dschat.report.run_files import Run
from dschat.runtime.files import write_text

CARD = "README.md"
MARK = "<!-- model card by dschat: rewritten by every run -->"
HUB_ID = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")
# Settings to show, in this order, if a run has them.
SETTINGS = (
    *("learning_rate", "actor_learning_rate", "critic_learning_rate", "lr_scheduler_type"),
    *("num_train_epochs", "max_train_steps", "per_device_train_batch_size"),
    *("per_device_generation_batch_size", "per_device_training_batch_size"),
    *("gradient_accumulation_steps", "max_seq_len", "max_prompt_seq_len", "max_answer_seq_len"),
    *("kl_coef", "ppo_epochs", "advantage_estimator", "beta", "lora_dim", "seed"),
)
USE_CAUSAL = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
"""
USE_REWARD = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
score = model(**tokenizer("prompt and answer", return_tensors="pt")).logits[0, 0]
"""


def write_model_card(folder: Path, run: Run) -> bool:
    """Write README.md into the folder of a saved model.

    A README.md that dschat did not write is kept.

    Args:
        folder: holds the model's config.json.
        run: the run that trained it.

    Returns:
        True if the card was written.
    """
    path = folder / CARD
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    write_text(path, model_card(folder, run))
    return True


def model_card(folder: Path, run: Run) -> str:
    """Return the text of the card; see ``write_model_card``."""
    config = run.record.get("config") or {}
    is_reward = is_classifier(folder)
    name = folder.name if folder == run.folder else f"{run.folder.name} ({folder.name})"
    parts = [
        _head(config, run.title, is_reward=is_reward),
        MARK,
        f"\n# {name}\n",
        f"Trained by dschat: {run.title}.\n",
        _table("Started from", _starts(config)),
        _table("Data", [(path, "") for path in config.get("data_path") or []]),
        _results(run),
        _table("Settings", _settings(run, config)),
        _table("Versions", list((run.record.get("versions") or {}).items())),
        "## Use\n",
        f"```python\n{USE_REWARD if is_reward else USE_CAUSAL}```\n",
        "## Limitations\n",
        "The model repeats what its data and, after step 3, its reward prefer, faults included. "
        "Evaluate it for your purpose before you use it.",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _head(config: dict, title: str, *, is_reward: bool) -> str:
    """Return the YAML block that the hub reads. Local paths are no names of the hub: left out."""
    tags = ["dschat", "deepspeed"]
    kinds = {"Step 1": "sft", "reward": "reward-model", "DPO": "dpo", "Step 3": "ppo"}
    tags += [tag for word, tag in kinds.items() if word in title]
    lines = ["---", "library_name: transformers"]
    lines.append(f"pipeline_tag: {'text-classification' if is_reward else 'text-generation'}")
    starts = [value for _, value in _starts(config) if _is_hub_id(value)]
    if starts:
        lines.append(f"base_model: {json.dumps(starts[0])}")
    datasets = [path for path in config.get("data_path") or [] if _is_hub_id(path)]
    if datasets:
        lines += ["datasets:", *(f"- {json.dumps(path)}" for path in datasets)]
    lines += ["tags:", *(f"- {tag}" for tag in tags), "---"]
    return "\n".join(lines)


def _is_hub_id(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def is_classifier(folder: Path) -> bool:
    """Return whether a saved model is a sequence classifier, as reward models are."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any("SequenceClassification" in name for name in config.get("architectures") or [])


def _starts(config: dict) -> list[tuple[str, str]]:
    names = ("model_name_or_path", "actor_model_name_or_path", "critic_model_name_or_path")
    return [(name, str(config[name])) for name in names if config.get(name)]


def _results(run: Run) -> str:
    rows = [
        (title, f"{number_text(run.curves[key][0][1])} to {number_text(run.curves[key][-1][1])}")
        for key, title in RESULTS.items()
        if key in run.curves
    ]
    return _table("Results, before and after training", rows)


def _settings(run: Run, config: dict) -> list[tuple[str, str]]:
    rows = [(name, str(config[name])) for name in SETTINGS if config.get(name) not in (None, "")]
    facts = ("dtype", "processes", "text_format", "total_steps", "rollouts")
    return rows + [(name, str(run.record[name])) for name in facts if name in run.record]


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join([f"## {title}\n", "| | |", "|-|-|", *lines, ""])


def _cell(value: object) -> str:
    """Return a value as a cell of a Markdown table."""
    return re.sub(r"([|<>`*_\\])", r"\\\1", str(value)).replace("\n", " ")
