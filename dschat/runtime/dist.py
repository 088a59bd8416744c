"""Ranks and collectives, the same with one process and with many."""

import os

import torch
import torch.distributed as dist


def rank() -> int:
    """This process's global rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def has_peers() -> bool:
    """True where there are other processes, so that a collective has something to do."""
    return world_size() > 1


def ranks_per_node() -> int:
    """Processes on this node, as its launcher says (deepspeed: LOCAL_SIZE, torchrun: LOCAL_WORLD_SIZE); else all."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def is_main() -> bool:
    """True on the one process that prints and writes."""
    return rank() == 0


def all_reduce(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """A copy of `tensor`, reduced over all processes by "sum", "max" or "min"."""
    result = tensor.detach().clone()
    if has_peers():
        dist.all_reduce(
            result,
            op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op],
        )
    return result


def gather_rows(rows: torch.Tensor, num_rows: int | None = None) -> torch.Tensor:
    """Rows of all processes, interleaved: row i of rank r becomes row i * world_size + r.

    That is the order in which ``ShardedSampler`` deals them out, so that the first `num_rows` are the data set's own
    rows and what wrapped around is cut off. Every process must bring the same number of rows, of any width: narrower
    ones are padded with zeros.

    Args:
        rows: [N] or [N, C].

    Returns:
        [N * world_size] or [N * world_size, C], cut to `num_rows`.
    """
    if has_peers():
        if rows.dim() > 1:
            width = int(all_reduce(torch.tensor(rows.shape[1], device=rows.device), "max"))
            rows = torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
        rows = rows.contiguous()
        shards = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(shards, rows)
        rows = torch.stack(shards, dim=1).flatten(0, 1)
    return rows if num_rows is None else rows[:num_rows]


def gather_texts(text: str) -> list[str]:
    """The texts of all processes, by rank."""
    if not has_peers():
        return [text]
    # As bytes in a tensor: torch's own gathering of objects goes by pickle.
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    own = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(own)], device=device))
    longest = max(int(length) for length in lengths)
    texts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(world_size())]
    dist.all_gather(texts, torch.nn.functional.pad(own, (0, longest - len(own))))
    return [bytes(row[: int(length)].tolist()).decode() for row, length in zip(texts, lengths)]


def first_fault(fault: str) -> str:
    """The text of the lowest rank that has one, on every process; "" where none has."""
    return next((text for text in gather_texts(fault) if text), "")


def barrier() -> None:
    """Wait for all processes."""
    if has_peers():
        dist.barrier()
