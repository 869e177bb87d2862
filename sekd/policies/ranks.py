"""Ranks and budgets: the arithmetic that every choice of positions shares."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the batch, or one for each sequence, which makes the draws independent of batching."""

Scores = Float[Tensor, "B T"]
Valid = Bool[Tensor, "B T"]
Weights = Float[Tensor, "B T"]


def budgets(valid: Bool[Tensor, "B T"], fraction: float) -> Int[Tensor, " B"]:
    """K of each sequence, with the exact ceiling of the decimal that the user wrote: 7 % of 100 is 7, not 8."""
    exact = Fraction(str(fraction))
    counts = [max(1, -(-n * exact.numerator // exact.denominator)) if n else 0 for n in valid.sum(1).tolist()]
    return torch.tensor(counts, device=valid.device)


def ranks(scores: Scores, valid: Valid, descending: bool = True) -> Int[Tensor, "B T"]:
    """The rank of each valid position in its sequence's order of scores, from 0; ties go to the lower index.

    Invalid positions come after all valid ones.
    """
    largest = torch.finfo(scores.dtype).max
    # A valid position must come before every invalid one, whatever its score.
    keys = torch.where(valid, scores.clamp(-largest, largest), -torch.inf if descending else torch.inf)
    order = keys.argsort(dim=1, descending=descending, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def top_k(scores: Scores, valid: Valid, fraction: float = 0.2, step: int = 0, generator: Generators = None) -> Weights:
    """1/K on the K highest scores of each sequence, ties to the lower index (arXiv 2602.01395, equation 6)."""
    k = budgets(valid, fraction)[:, None]
    return (ranks(scores, valid) < k) / k.clamp(min=1)


def eligible(valid: Valid, skip_first: int, position_ids: Int[Tensor, "B T"] | None = None) -> Valid:
    """The valid positions without the first ``skip_first`` of each document (arXiv 2602.01395, appendix D).

    A sequence that would have none left keeps all. Documents of a packed sequence begin where ``position_ids`` is 0.
    Without ``position_ids`` each sequence is one document.
    """
    if not skip_first:
        return valid
    before = valid.cumsum(1) - valid.long()  # valid positions to the left
    if position_ids is not None:
        before = before - torch.where(position_ids == 0, before, 0).cummax(1).values
    allowed = valid & (before >= skip_first)
    return torch.where(allowed.any(1, keepdim=True), allowed, valid)


def check_finite(scores: Scores, valid: Valid) -> None:
    """Raise FloatingPointError for a score that is not finite: positions cannot be ranked by it."""
    if not scores[valid].isfinite().all():
        raise FloatingPointError("a position score is not finite")


def check_weights(weights: Tensor, valid: Valid) -> Weights:
    """The weights of a policy as they are; ValueError for weights that cannot be a policy's."""
    if weights.shape != valid.shape:
        raise ValueError(f"the position policy returned weights of shape {[*weights.shape]}, not {[*valid.shape]}")
    if not (weights >= 0).all() or (weights[~valid] != 0).any():
        raise ValueError(
            "the position policy returned a weight that is negative, not a number, or not 0 at a position that may not "
            "be chosen"
        )
    return weights


def uniform(counts: Int[Tensor, " B"], generator: Generators, dtype: torch.dtype | None = None) -> Tensor:
    """Uniform numbers in [0, 1), ``counts[b]`` of them for sequence b, concatenated."""
    numbers = counts.tolist()
    if not isinstance(generator, Sequence):
        return torch.rand(sum(numbers), generator=generator, dtype=dtype)
    return torch.cat([torch.rand(n, generator=g, dtype=dtype) for n, g in zip(numbers, generator, strict=True)])
