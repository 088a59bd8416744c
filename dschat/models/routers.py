"""The routers of a mixture of experts, watched while the model computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from dschat.models.structure import pretrained


class RouterWatch:
    """Records the logits of all routers.

    Attributes:
        coef: the weight of the auxiliary loss that is computed from them.
        top_k: experts for each token.
    """

    def __init__(self, model: nn.Module, *, coef: float, flag: str = "--router_aux_loss_coef"):
        """
        Args:
            model: a mixture of experts. Its layers must not be compiled.
            coef: the weight of the loss.
            flag: the command-line flag that `coef` came from, for messages.

        Raises:
            ValueError: transformers names no routers of the model.
        """
        inner = pretrained(model)
        text = inner.config.get_text_config()
        routers = list(_routers(inner))
        self.coef = coef
        self.top_k = getattr(text, "num_experts_per_tok", None)
        if not routers or not self.top_k:
            raise ValueError(
                f"{flag} {coef}: {type(inner).__name__} has no routers whose load transformers "
                "reports. Leave it out for this model."
            )
        self._logits: list[torch.Tensor] = []
        self._is_open = False
        for router, index in routers:
            router.register_forward_hook(
                lambda _module, _inputs, output, i=index: self._add(output, i)
            )

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record forward passes with gradients in this context, of which there should be one.

        Outside of it, gradient checkpointing computes layers again.
        """
        self._logits, self._is_open = [], True
        try:
            yield
        finally:
            self._is_open = False

    def take(self) -> list[torch.Tensor]:
        """Return the logits [B * T, experts] of each router in the recorded forward pass."""
        logits, self._logits = self._logits, []
        return logits

    def _add(self, output, index: int) -> None:
        if self._is_open and torch.is_grad_enabled():
            found = output if isinstance(output, torch.Tensor) else output[index]
            self._logits.append(found.flatten(0, -2))


def _routers(model: PreTrainedModel) -> Iterator[tuple[nn.Module, int]]:
    """Yield the routers that transformers can report, and the place of the logits in outputs."""
    for part in model.modules():
        recorders = getattr(part, "_can_record_outputs", None) or {}
        recorder = recorders.get("router_logits") if isinstance(part, PreTrainedModel) else None
        if not isinstance(recorder, OutputRecorder):
            continue
        found = [
            (module, recorder.index)
            for name, module in part.named_modules()
            if isinstance(module, recorder.target_class)
            and (recorder.layer_name is None or recorder.layer_name in name)
        ]
        if found:
            yield from found
            return
