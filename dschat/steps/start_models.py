"""Models in memory from which a run starts, saved as the folders that a step loads.

The run thus begins as one that was given a path: with the same checks and the same memory plan, in
every ZeRO stage, and with a reference that is a copy.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dschat.checkpoint.save_model import save_model
from dschat.models.tokenizer import load_tokenizer
from dschat.runtime import dist

FOLDER = "start_models"  # in the output folder


@dataclass(frozen=True)
class StartModel:
    """A model in memory, with its tokenizer."""

    name: str  # of the trainer's argument
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def path(self, output_dir: str) -> str:
        """Return the folder that it is saved to."""
        return str(Path(output_dir) / FOLDER / self.name)

    def save(self, output_dir: str, *, keep: bool) -> None:
        """Save it below the output folder. Every rank must call it.

        Args:
            output_dir: of the run.
            keep: keep what is there, which a run that is resumed has begun with.
        """
        folder = Path(self.path(output_dir))
        kept = keep and (folder / "config.json").is_file()
        if dist.first_fault("" if kept else "missing"):
            save_model(self.model, self.tokenizer, folder)


def start_model(
    model: object, tokenizer: PreTrainedTokenizerBase | None, *, name: str
) -> StartModel:
    """Return a model in memory with its tokenizer, loaded from where the model came from if None.

    Raises:
        ValueError: it is no model of the transformers library, or it has no tokenizer.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{name} is of the type {type(model).__name__}: give a model of the transformers "
            "library, or the path of one. A PEFT model becomes one by merge_and_unload()."
        )
    if tokenizer is None:
        if not model.name_or_path:
            raise ValueError(f"{name} has no tokenizer: give it as processing_class.")
        tokenizer = load_tokenizer(model.name_or_path, flag=name)
    return StartModel(name, model, tokenizer)


def delete_start_models(output_dir: str) -> None:
    """Delete the saved models of a run that is finished; only rank 0 does."""
    if dist.is_main():
        shutil.rmtree(Path(output_dir) / FOLDER, ignore_errors=True)
