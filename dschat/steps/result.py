"""The result of a training run: its metrics, and its models, loaded when they are asked for."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dschat.models.causal_lm import load_config
from dschat.models.classifiers import ensure_classifier
from dschat.models.inference_device import inference_placement
from dschat.models.tokenizer import load_tokenizer
from dschat.tracking.callbacks import Callback


class LatestMetrics(Callback):
    """The newest value of each metric of a run."""

    every_rank = True

    def __init__(self) -> None:
        """Start without any."""
        self.values: dict[str, float] = {}

    def on_update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of an update."""
        self.values |= metrics

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of an evaluation."""
        self.values |= metrics


@dataclass
class TrainResult:
    """A finished run. Its models are plain transformers models, on a GPU if there is one."""

    output_dir: Path  # holds the models, metrics.jsonl, run.json and report.html
    metrics: dict[str, float]  # the newest value of each metric
    folder: str = ""  # of the trained model below output_dir: "" or "actor"
    is_classifier: bool = False  # of a reward model
    trust_remote_code: bool = False
    # Deletes a temporary output_dir together with this object.
    temporary: tempfile.TemporaryDirectory | None = field(default=None, repr=False)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The trained model: SFT or DPO model, reward model, or the actor of PPO."""
        return self._load(self.folder, is_classifier=self.is_classifier)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of ``model``."""
        return load_tokenizer(
            str(self.output_dir / self.folder),
            trust_remote_code=self.trust_remote_code,
            flag="output_dir",
        )

    @cached_property
    def value_model(self) -> PreTrainedModel | None:
        """The critic of PPO; None if the run has none."""
        if not (self.output_dir / "critic").is_dir():
            return None
        return self._load("critic", is_classifier=True)

    def load(self) -> None:
        """Load everything now."""
        for name in ("model", "tokenizer", "value_model"):
            getattr(self, name)

    def _load(self, folder: str, *, is_classifier: bool) -> PreTrainedModel:
        path = str(self.output_dir / folder)
        _, config = load_config(path, flag="output_dir", trust_remote_code=self.trust_remote_code)
        loader = AutoModelForCausalLM
        if is_classifier:
            loader = AutoModelForSequenceClassification
            ensure_classifier(config)
        model = loader.from_pretrained(path, dtype="auto", trust_remote_code=self.trust_remote_code)
        device, _ = inference_placement()
        return model.to(device)
