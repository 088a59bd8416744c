"""Checks that a model keeps the texts of a packed row apart."""

import inspect

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dschat.models.forward import forward_logits
from dschat.models.reward_model import RewardModel

REMEDY = "Leave out --packing; --tokens_per_batch also saves padding, with every family."
# Two texts of equal length, and one after them. Any vocabulary has these ids.
FIRST, OTHER, SECOND = [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16, 17]


def check_takes_positions(config: PreTrainedConfig, *, path: str) -> None:
    """Check that the family's forward takes position ids, before any weights are loaded.

    A model that comes with Python code is not checked here; see ``check_packing``.

    Args:
        config: of the model.
        path: value of --model_name_or_path.

    Raises:
        ValueError: it does not, such as families with ALiBi and recurrent ones.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    if "position_ids" not in inspect.signature(model_class.forward).parameters:
        raise ValueError(
            f"--packing: {config.model_type} models, such as --model_name_or_path {path}, take no "
            f"position ids, so texts in one row cannot be kept apart. {REMEDY}"
        )


def check_packing(engine: nn.Module, model: nn.Module, *, path: str) -> None:
    """Check with one small forward that a text in a packed row does not see the text before it.

    Every rank must call it. The model is left in evaluation mode.

    Args:
        engine: the module to call, see ``forward_logits``.
        model: the transformers model, or the ``RewardModel`` around it.
        path: value of --model_name_or_path.

    Raises:
        ValueError: the logits (of a reward model the values) of a text depend on the text before it
            or on its place in the row.
    """
    engine.eval()
    device = next(model.parameters()).device
    rows = torch.tensor([FIRST + SECOND, OTHER + SECOND, SECOND + FIRST], device=device)
    after, first = [*range(4), *range(5)], [*range(5), *range(4)]
    positions = torch.tensor([after, after, first], device=device)
    inputs = dict(input_ids=rows, attention_mask=None, position_ids=positions)
    is_reward = isinstance(model, RewardModel)
    with torch.no_grad():
        found = engine(**inputs) if is_reward else forward_logits(engine, model, **inputs)
    found = found.float()
    expected = found[2, :5]
    # The largest of five values is smaller, relative to rounding, than that of all logits.
    half = 0.2 if is_reward else 5e-2
    precise = next(model.parameters()).dtype == torch.float32
    tolerance = (1e-3 if precise else half) * expected.abs().max()
    if (found[:2, 4:] - expected).abs().max() > tolerance:
        raise ValueError(
            f"--packing: in --model_name_or_path {path} a text sees the one before it in the same "
            f"row, for example through a recurrent state. {REMEDY}"
        )
