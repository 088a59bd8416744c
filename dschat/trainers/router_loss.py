"""The auxiliary loss of the routers in a mixture of experts."""

import torch

from dschat.algorithms.load_balance import load_balance
from dschat.models.routers import RouterWatch


def router_loss(
    routers: RouterWatch, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the auxiliary loss and the load of the recorded batch; see ``load_balance``.

    Args:
        routers: have recorded a forward pass.
        attention_mask: [B, T] of the batch, 1 where a token counts.
    """
    return load_balance(routers.take(), attention_mask.reshape(-1), top_k=routers.top_k)
