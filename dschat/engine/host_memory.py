"""Copies of a rank's state in host memory, which can be written while training continues."""

import copy
from typing import Any

import torch


class HostMemory:
    """Host memory for one copy of the state; the next copy uses it again.

    Copying then needs no new memory, whose first use is slower than the copy itself.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.UntypedStorage] = []
        self._used = 0
        self._copied: dict[tuple[torch.device, int], torch.UntypedStorage] = {}

    def begin(self) -> None:
        """Give all memory free: the last copy is no longer needed."""
        self._used = 0

    def copy(self, value: Any) -> Any:
        """Return a copy of `value` whose tensors are in host memory.

        Containers are copied, tensors that share memory share it in the copy too, and other values
        are copied deeply. The copy is complete when this returns.
        """
        self._copied = {}
        copied = self._copy(value)
        self._copied = {}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value)
        if isinstance(value, dict):
            # Of the same class and with its attributes, such as a state_dict's _metadata.
            copied = copy.copy(value)
            for key, item in value.items():
                copied[key] = self._copy(item)
            return copied
        if type(value) in (list, tuple):
            return type(value)(self._copy(item) for item in value)
        return copy.deepcopy(value)

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        source = tensor.untyped_storage()
        key = (tensor.device, source.data_ptr())
        target = self._copied.get(key) if source.nbytes() else None
        if target is None:
            target = self._buffer(source.nbytes())
            target.copy_(source, non_blocking=True)
            self._copied[key] = target
        place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        return torch.empty(0, dtype=tensor.dtype).set_(target, *place)

    def _buffer(self, num_bytes: int) -> torch.UntypedStorage:
        """Return the next free memory of `num_bytes`."""
        number = self._used
        self._used += 1
        if number == len(self._buffers):
            self._buffers.append(torch.UntypedStorage(num_bytes))
        elif self._buffers[number].nbytes() != num_bytes:
            self._buffers[number] = torch.UntypedStorage(num_bytes)
        return self._buffers[number]
