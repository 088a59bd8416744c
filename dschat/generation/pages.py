"""A key-value cache in pages, so that memory follows the tokens that exist.

A slot that holds its longest possible response from the start would leave most of its memory
unused. Here a slot holds pages of PAGE positions and gets another when it needs one
(PagedAttention, Kwon et al. 2023). All layers use the same page numbers.
"""

from collections.abc import Sequence

import torch

from dschat.generation.decoding import StepCache, StepLayer
from dschat.generation.kernels.attention import PAGE

SPARE = 0  # the page that slots without a response write to


def pages_for(positions: int) -> int:
    """Return the number of pages that hold so many positions."""
    return -(-positions // PAGE)


class PageTable:
    """The pages of each slot, on the host.

    Attributes:
        table: [N, P] int32, the pages of each slot in the order of their positions; SPARE where it
            has none.
        changed: whether the table differs from the device's copy.
    """

    def __init__(self, *, pages: int, slots: int, pages_per_slot: int):
        """
        Args:
            pages: number of pages, SPARE included; at least one slot's and SPARE.
            slots: N.
            pages_per_slot: P.
        """
        assert pages > pages_per_slot, "the longest response must fit"
        self.num_pages = pages
        self.table = torch.full((slots, pages_per_slot), SPARE, dtype=torch.int32)
        self.changed = True
        self._free = list(range(pages - 1, SPARE, -1))
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._users = [0] * pages  # slots that hold a page
        self.most_used = 0

    @property
    def num_free(self) -> int:
        """Pages that no slot holds."""
        return len(self._free)

    def missing(self, slot: int, positions: int) -> int:
        """Return how many more pages a slot needs to hold so many positions."""
        return max(0, pages_for(positions) - len(self._held[slot]))

    def grow(self, slot: int, positions: int) -> None:
        """Give a slot pages for so many positions. They must be free."""
        held = self._held[slot]
        for _ in range(self.missing(slot, positions)):
            page = self._free.pop()
            self._users[page] = 1
            self.table[slot, len(held)] = page
            held.append(page)
            self.changed = True
        self.most_used = max(self.most_used, self.num_pages - 1 - self.num_free)

    def share(self, slot: int, other: int, count: int) -> None:
        """Let a slot without pages begin with the first `count` pages of another slot.

        Neither may write to them.
        """
        shared = self._held[other][:count]
        for page in shared:
            self._users[page] += 1
        self._held[slot] = shared
        self.table[slot, :count] = self.table[other, :count]
        self.changed = True

    def free(self, slot: int) -> None:
        """Take back all pages of a slot that no other slot holds."""
        for page in reversed(self._held[slot]):
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free.append(page)
        self._held[slot] = []
        self.table[slot] = SPARE
        self.changed = True

    def keep(self, slots: Sequence[int]) -> None:
        """Move slots to the front, and take back the pages of the others."""
        for slot in set(range(len(self._held))) - set(slots):
            self.free(slot)
        rest = len(self._held) - len(slots)
        self._held = [self._held[slot] for slot in slots] + [[] for _ in range(rest)]
        moved = self.table[list(slots)]
        self.table.fill_(SPARE)
        self.table[: len(slots)] = moved
        self.changed = True


class PagedLayer(StepLayer):
    """A StepLayer of buffers [number of pages, heads, PAGE, head width].

    In a step that is not captured, the new token of each slot is written at its position in
    `newest`, and ``update`` returns copies without pages, [rows, heads, filled, width].
    """

    table: torch.Tensor | None = None  # [N, P], of the device

    def _store(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index = place(self.table[: self.rows], self.newest)
        self.keys[index] = key_states[:, :, 0]
        self.values[index] = value_states[:, :, 0]
        self.filled += 1
        return self._without_pages(self.keys), self._without_pages(self.values)

    def _without_pages(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return the filled positions [rows, heads, filled, width] of a buffer."""
        pages = buffer[self.table[: self.rows, : pages_for(self.filled)].long()]
        return pages.transpose(1, 2).flatten(2, 3)[:, :, : self.filled]

    def get_max_length(self) -> int:
        """Return the number of positions in all pages."""
        return self.keys.shape[0] * PAGE


class PagedCache(StepCache):
    """A PagedLayer for each layer of the model."""

    layer_class = PagedLayer

    def __init__(self, shapes: list[tuple[torch.Tensor, torch.Tensor]], *, pages: int):
        """Allocate so many pages; see StepCache for `shapes`."""
        super().__init__(shapes, rows=pages, length=PAGE)

    def use_table(self, table: torch.Tensor) -> None:
        """Let the slots' pages be those of `table` [N, P], for steps that are not captured."""
        for layer in self.layers:
            layer.table = table


def place(table: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, slice, torch.Tensor]:
    """Return the index of one position of each slot in a buffer of pages.

    Args:
        table: [n, P], the slots' pages.
        positions: [n].
    """
    pages = table.gather(1, (positions // PAGE).long()[:, None])[:, 0]
    return pages.long(), slice(None), (positions % PAGE).long()
