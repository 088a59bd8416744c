"""Checks of a model folder that a step wrote."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_plainly(folder: Path, *, reward: bool = False):
    """Load the saved model by transformers alone, without missing or unexpected weights."""
    model_class = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    model, info = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def check_model_folder(folder: Path, *, start: Path, reward: bool, options: dict) -> None:
    """Check that the folder loads, has the precision of training, and differs from `start` where
    trained.

    Args:
        start: the causal language model, or the reward model, that training began with.
        options: one value of each axis of `options.py`.
    """
    model = load_plainly(folder, reward=reward)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == AutoConfig.from_pretrained(folder).dtype == TORCH_DTYPES[options["dtype"]]
    is_new = tokenizer.eos_token not in AutoTokenizer.from_pretrained(start).get_vocab()
    check_changes(
        model,
        start,
        lora=options["lora"],
        exact=options["dtype"] == "fp32",
        new_token=tokenizer.eos_token_id if is_new else None,
    )
    assert tokenizer.eos_token == ("<|endoftext|>" if options["eot"] else "</s>")
    assert len(tokenizer) <= model.get_input_embeddings().num_embeddings
    assert tokenizer.chat_template
    if reward:
        assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    else:
        ends = model.generation_config.eos_token_id
        assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
        assert not model.generation_config.do_sample
    assert not list(folder.parent.glob(f".{folder.name}*")), "a temporary folder was left"


def check_changes(
    model, start: Path, *, lora: str, exact: bool, new_token: int | None = None
) -> None:
    """Check that trained weights changed and no others.

    If not `exact`, norms may be unchanged: rounding near 1 may swallow short training. The row of
    `new_token` trains although the others of the embedding and the head are frozen.
    """
    is_reward = "ForSequenceClassification" in AutoConfig.from_pretrained(start).architectures[0]
    before = load_plainly(start, reward=is_reward).state_dict()
    after = model.state_dict()
    common = {name for name in after if name in before} - {"score.weight"}
    assert set(after) - common <= {"score.weight"}
    changed = {name for name in common if _differs(before[name], after[name])}
    layers = {name for name in common if ".layers." in name or ".h." in name}
    matrices = {name for name in layers if after[name].dim() == 2}
    assert matrices and matrices <= changed
    if lora == "only-lora" and new_token is not None:
        grown = changed - layers
        assert grown, "the row of the new token"
        for name in grown:
            differs = after[name][: before[name].shape[0]] != before[name].to(after[name].dtype)
            assert differs.any(1).nonzero().tolist() == [[new_token]], name
        assert changed - grown == matrices
    elif lora == "only-lora":
        assert changed == matrices
    else:
        assert changed - layers, "embeddings and last norm"
        assert (changed & layers) - matrices or not exact, "norms and biases"


def _differs(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Return whether rows that both have differ; a vocabulary may have grown."""
    return not torch.equal(after[: before.shape[0]], before.to(after.dtype))
