"""Statistics under masks over responses."""

import torch


def last_index(mask: torch.Tensor) -> torch.Tensor:
    """Return the last True position [B] int64 of each row of `mask` [B, T], 0 if there is none."""
    positions = torch.arange(mask.shape[-1], device=mask.device)
    return (positions * (mask != 0)).argmax(-1)


def pool_last(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return `values` [B, T] at the last True position of `mask` [B, T], as [B].

    This is a reward model's score.
    """
    return values.gather(-1, last_index(mask)[:, None]).squeeze(-1)


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum `values` under `mask` to a scalar; values outside, NaN included, have no influence."""
    return torch.where(mask.bool(), values, torch.zeros_like(values)).sum()


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average `values` under `mask` to a scalar; NaN for an empty mask."""
    return masked_sum(values, mask) / mask.bool().sum()


def moments(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return [3] float64: count, sum and sum of squares under `mask`.

    Add those of all ranks for global statistics.
    """
    values, mask = values.double(), mask.bool()
    return torch.stack(
        [mask.sum().double(), masked_sum(values, mask), masked_sum(values * values, mask)]
    )


def mean_and_std(totals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and (biased) standard deviation from ``moments``."""
    count, total, squares = totals
    mean = total / count
    return mean, (squares / count - mean * mean).clamp(min=0).sqrt()


def masked_whiten(
    values: torch.Tensor, mask: torch.Tensor, totals: torch.Tensor | None = None
) -> torch.Tensor:
    """Return (values - mean) / std under `mask`, and 0 elsewhere.

    Args:
        values: [B, R].
        mask: [B, R], True on the values that count.
        totals: ``moments`` summed over all ranks; default: those of these rows alone.
    """
    mean, std = mean_and_std(moments(values, mask) if totals is None else totals)
    white = (values.double() - mean) / (std + 1e-8)
    return torch.where(mask.bool(), white, torch.zeros_like(white)).to(values.dtype)
