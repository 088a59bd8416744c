"""Comparison of a model that is split over a tensor-parallel group with the whole model.

Logits are no measure for it: in half precision, two right models differ more the deeper they are.
So each decoder layer is compared by itself, on the whole model's input to it, and what a layer adds
to the residual stream is measured against the rounding of one layer. The bound holds at any depth.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from dschat.generation.decoding import TOLERANCE, logit_gap, prefill
from dschat.generation.tensor_parallel import TensorGroup, gather_prompts
from dschat.models.forward import forward_logits
from dschat.models.structure import decoder_layers
from dschat.runtime import dist

CHECKED_ROWS = 2  # prompts of each rank
CHECKED_TOKENS = 64  # the last tokens of each; the outputs of all layers are held at a time
LAYER_SHARE = 0.1  # largest difference of what a layer adds, as a share of its norm
ROUNDINGS = 4  # of the residual stream, which a difference may have besides


def check_split(
    engine,
    replica: nn.Module,
    group: TensorGroup,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
) -> None:
    """Compare the group's replica with the training module, layer by layer.

    Args:
        engine: the training engine, with whole weights. All ranks must call it.
        replica: this rank's slice.
        group: the ranks that generate together.
        input_ids, attention_mask: prompts [B, P] of this rank, padded on the left.

    Raises:
        ValueError: they differ on any rank: the model's tensor-parallel plan is incomplete.
    """
    part = (slice(CHECKED_ROWS), slice(-CHECKED_TOKENS, None))
    ids, mask = gather_prompts(group, input_ids[part], attention_mask[part])
    start = int(mask.argmax(-1).min())
    ids, mask = ids[:, start:], mask[:, start:]
    attended = mask.bool()
    outputs: list[torch.Tensor] = []
    gaps: list[torch.Tensor] = []

    def record(layer: int, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        outputs.append(after)
        return after

    def compare(layer: int, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        expected = outputs[layer]
        gaps.append(layer_gap(after[attended], expected[attended], before[attended]))
        return expected  # the input of the next layer

    engine.eval()
    with observed_layers(engine.module, record):
        expected = forward_logits(
            engine, engine.module, input_ids=ids, attention_mask=mask, logits_to_keep=1
        )[:, -1]
    with observed_layers(replica, compare):
        found, _ = prefill(replica, ids, mask)
    measured = torch.stack([*gaps, logit_gap(found, expected) / TOLERANCE[expected.dtype]])
    fails = dist.all_reduce((~(measured <= 1)).long(), "max")  # so written that NaN fails
    if fails.any():
        first = int(fails.nonzero()[0])
        place = f"decoder layer {first}" if first < len(gaps) else "the logits"
        raise ValueError(
            f"--inference_tp_size {group.size}: {type(engine.module).__name__}, split, computes "
            f"something else than whole, first in {place}: give --inference_tp_size 1."
        )


def layer_gap(found: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return the difference of a layer's outputs, as a share of what rounding may explain.

    Args:
        found, expected: outputs [n, H].
        before: its input [n, H].

    Returns:
        A scalar; above 1: more than rounding.
    """
    eps = torch.finfo(expected.dtype).eps
    found, expected, before = (t.float() for t in (found, expected, before))
    bound = LAYER_SHARE * (expected - before).norm() + ROUNDINGS * eps * expected.norm()
    return (found - expected).norm() / bound


@contextlib.contextmanager
def observed_layers(
    model: nn.Module, see: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Call `see(number, input, output)` after each decoder layer; its result is the layer's output.

    Args:
        model: a causal language model.
        see: takes hidden states [B, T, H].
    """

    def hook_of(number: int):
        def hook(module, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            if isinstance(output, tuple):
                return (see(number, before, output[0]), *output[1:])
            return see(number, before, output)

        return hook

    _, layers = decoder_layers(model)
    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(hook_of(number), with_kwargs=True).remove)
        yield
