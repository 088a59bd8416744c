"""The buffers of a captured decode step, which keep their addresses while its graphs exist."""

from dataclasses import dataclass

import torch


@dataclass
class GraphBuffers:
    """The buffers that a decode step reads and writes, of N slots and R response tokens."""

    token: torch.Tensor  # [N, 1] int64, the newest token
    positions: torch.Tensor  # [N, 1] int64, its position id
    # [N, 1, 1, 2] int32, the cache positions that a row attends to: first, and one after the newest
    bounds: torch.Tensor
    position: torch.Tensor  # [1] int64, where the newest token goes in the cache
    step: torch.Tensor  # [] int64, the number of response tokens
    row: torch.Tensor  # [N] int64, the response that a slot works on
    finished: torch.Tensor  # [N] bool
    remaining: torch.Tensor  # [] int64, slots that have not finished
    tokens: torch.Tensor  # [N, R] int64, the responses
    logprobs: torch.Tensor  # [N, R] fp32
    # [N, T] int64, prompts and responses if the repetition penalty reads them, else [N, 0]
    texts: torch.Tensor
    logits: torch.Tensor  # [N, V], of the last step

    def take(self, slots: torch.Tensor) -> None:
        """Move slots [n] to the front."""
        for buffer in (
            self.token,
            self.positions,
            self.bounds,
            self.row,
            self.finished,
            self.texts,
        ):
            buffer[: len(slots)] = buffer[slots]

    @classmethod
    def allocate(
        cls, *, slots: int, num_new: int, num_text: int, vocab: int, like: torch.Tensor
    ) -> "GraphBuffers":
        """Allocate buffers of N = `slots`, R = `num_new`, T = `num_text` and V = `vocab`.

        The logits have the dtype of `like`, and all buffers its device.
        """
        device = like.device
        whole = dict(dtype=torch.int64, device=device)
        return cls(
            token=torch.zeros(slots, 1, **whole),
            positions=torch.zeros(slots, 1, **whole),
            bounds=torch.zeros(slots, 1, 1, 2, dtype=torch.int32, device=device),
            position=torch.zeros(1, **whole),
            step=torch.zeros((), **whole),
            row=torch.arange(slots, device=device),
            finished=torch.zeros(slots, dtype=torch.bool, device=device),
            remaining=torch.zeros((), **whole),
            tokens=torch.zeros(slots, num_new, **whole),
            logprobs=torch.zeros(slots, num_new, device=device),
            texts=torch.zeros(slots, num_text, **whole),
            logits=torch.zeros(slots, vocab, dtype=like.dtype, device=device),
        )
