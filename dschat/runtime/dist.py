"""Ranks and collectives, which also work without a process group."""

import os

import torch
import torch.distributed as dist


def rank() -> int:
    """Return the global rank; without a process group, the one that the launcher has set, or 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def has_peers() -> bool:
    """Return whether there are other ranks, so that a collective has something to do."""
    return world_size() > 1


def ranks_per_node() -> int:
    """Return the number of ranks on this node.

    The launcher sets it: LOCAL_SIZE (deepspeed) or LOCAL_WORLD_SIZE (torchrun). Without either, all
    ranks are taken to be on this node.
    """
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def is_main() -> bool:
    """Return whether this is rank 0, which prints and writes."""
    return rank() == 0


def all_reduce(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """Return a detached copy of `tensor`, reduced over all ranks by "sum", "max" or "min"."""
    result = tensor.detach().clone()
    if has_peers():
        ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        dist.all_reduce(result, op=ops[op])
    return result


def gather_rows(rows: torch.Tensor, num_rows: int | None = None) -> torch.Tensor:
    """Gather the rows of all ranks, interleaved: row i of rank r becomes row i * world_size + r.

    ``ShardedSampler`` deals rows out in this order, so the first `num_rows` are the rows of the
    data set, and those that wrapped around are cut off. Every rank must pass the same number of
    rows. Widths may differ: narrower rows are padded with zeros.

    Args:
        rows: [N] or [N, C].
        num_rows: rows to keep; None: all.

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


def new_cpu_group() -> dist.ProcessGroup | None:
    """Return another group of all ranks, for a thread; None without peers. All ranks call it."""
    return dist.new_group(backend="gloo") if has_peers() else None


def gather_texts(text: str, group: dist.ProcessGroup | None = None) -> list[str]:
    """Gather the strings of all ranks, in the order of ranks.

    Args:
        text: of this rank.
        group: from ``new_cpu_group``; None: the group of training.
    """
    if not has_peers():
        return [text]
    # As bytes in a tensor: torch.distributed.all_gather_object would unpickle data of other ranks.
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    own = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(own)], device=device), group=group)
    longest = max(int(length) for length in lengths)
    texts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(world_size())]
    padded = torch.nn.functional.pad(own, (0, longest - len(own)))
    dist.all_gather(texts, padded, group=group)
    return [
        bytes(row[: int(length)].tolist()).decode()
        for row, length in zip(texts, lengths, strict=True)
    ]


def first_fault(fault: str, group: dist.ProcessGroup | None = None) -> str:
    """Return the first non-empty `fault` by rank, on every rank; "" if all are empty."""
    return next((text for text in gather_texts(fault, group) if text), "")


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait for all ranks."""
    if has_peers():
        dist.barrier(group)
