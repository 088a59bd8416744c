"""The load of the experts in a mixture of experts, and the loss that evens it out."""

from collections.abc import Sequence

import torch


def load_balance(
    logits: Sequence[torch.Tensor], mask: torch.Tensor, *, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the auxiliary loss of routers, and the load of the busiest expert.

    The loss is E * sum_i f_i P_i (Fedus et al. 2021, Switch Transformers, equations 4 to 6), with
    the routers of all layers taken together as in transformers: f_i is the number of times that a
    token is sent to expert i, P_i the mean probability of expert i, and E the number of experts. It
    is top_k if all experts are used alike.

    Args:
        logits: [N, E] of each router, for all tokens of a batch.
        mask: [N], 1 where a token counts.
        top_k: experts for each token.

    Returns:
        The loss, a scalar fp32; and the share of the busiest expert over an even share, the mean of
        the layers, without gradient: 1 is even, E / top_k sends all tokens to the same experts.
    """
    weight = mask.float()
    count = weight.sum().clamp(min=1)
    chosen, probabilities, busiest = [], [], []
    for layer in logits:
        probability = layer.float().softmax(-1)
        uses = torch.zeros_like(probability).scatter_(1, layer.topk(top_k, -1).indices, 1.0)
        uses = weight @ uses / count
        chosen.append(uses)
        probabilities.append(weight @ probability / count)
        busiest.append(uses.max() * layer.shape[-1] / top_k)
    f = torch.stack(chosen).mean(0)
    p = torch.stack(probabilities).mean(0)
    return len(f) * (f * p).sum(), torch.stack(busiest).mean().detach()
