"""Policies that are functions of the scores alone.

The loss of a sequence is sum_t w_t * l_t. Weights that sum to 1 make it a mean over the chosen positions. With n
valid positions in a sequence and a fraction k, the budget is K = max(1, ceil(k n)), and 0 where n = 0. Definitions
after arXiv 2602.01395, section 5 and appendices A and D.
"""

from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from sekd.policies.ranks import Generators, Scores, Valid, Weights, budgets, check_finite, ranks, top_k, uniform
from sekd.scores import rescale


def all_positions(
    scores: Scores, valid: Valid, fraction: float = 1.0, step: int = 0, generator: Generators = None
) -> Weights:
    """1/n on every valid position: Full KD (Hinton et al., 2015)."""
    return valid / valid.sum(1, keepdim=True).clamp(min=1)


def prefix(scores: Scores, valid: Valid, fraction: float = 0.2, step: int = 0, generator: Generators = None) -> Weights:
    """1/K on the first K valid positions of a sequence, packed or not: prefix truncation (arXiv 2602.15260)."""
    k = budgets(valid, fraction)[:, None]
    return (valid & (valid.cumsum(1) <= k)) / k.clamp(min=1)


def random(scores: Scores, valid: Valid, fraction: float = 0.2, step: int = 0, generator: Generators = None) -> Weights:
    """1/K on K valid positions drawn uniformly without replacement (RandomPos, arXiv 2602.01395, section 5)."""
    draws = uniform(valid.sum(1), generator)
    keys = torch.zeros(valid.shape, device=valid.device).masked_scatter(valid, draws.to(valid.device))
    return top_k(keys, valid, fraction)


def curriculum(
    scores: Scores,
    valid: Valid,
    fraction: float = 0.2,
    step: int = 0,
    generator: Generators = None,
    steps: int = 4000,
) -> Weights:
    """1/K on a window of K positions in ascending order of score. The window moves from the easiest to the hardest.

    It starts at floor((n - K) * phase) with phase = min(1, step / steps) (Feng et al., 2024; arXiv 2602.01395,
    section 5). Ties keep the order of positions.
    """
    k = budgets(valid, fraction)[:, None]
    start = (valid.sum(1, keepdim=True) - k) * min(step, steps) // steps
    rank = ranks(scores, valid, descending=False)
    return ((rank >= start) & (rank < start + k)) / k.clamp(min=1)


def pos_rs(
    scores: Scores,
    valid: Valid,
    fraction: float = 0.2,
    step: int = 0,
    generator: Generators = None,
    exponent: float = 1.0,
    coverage: float = 0.0,
) -> Weights:
    """c_t / K, with c_t the count of position t among K draws with replacement from r(t) = s_t^a / sum_j s_j^a.

    Unbiased for Weighted KD (arXiv 2602.01395, appendix A). An ``exponent`` a below 1 flattens r (the paper's 1/T).
    ``coverage`` is the part of the budget, rounded down, that the highest scores get at 1/K each. The rest of the
    budget is drawn from the other positions. Both options are from appendix D.
    """
    top, counts, k, _ = _draw(scores, valid, fraction, generator, exponent, coverage)
    return (top + counts) / k.clamp(min=1)


def pos_rs_corrected(
    scores: Scores,
    valid: Valid,
    fraction: float = 0.2,
    step: int = 0,
    generator: Generators = None,
    exponent: float = 1.0,
    coverage: float = 0.0,
) -> Weights:
    """c_t / (K n r(t)): importance-corrected :func:`pos_rs`, unbiased for Full KD (Pos RS-KD*, appendix A).

    With ``coverage`` the positions that are always taken weigh 1/n, so the loss stays unbiased. A position with score
    0 is never drawn.
    """
    top, counts, k, r = _draw(scores, valid, fraction, generator, exponent, coverage)
    n = valid.sum(1, keepdim=True).clamp(min=1)
    drawn = counts / ((k - top.sum(1, keepdim=True)).clamp(min=1) * n * r.where(counts > 0, 1))
    return (top / n + drawn).to(scores.dtype)


def weighted(
    scores: Scores, valid: Valid, fraction: float = 1.0, step: int = 0, generator: Generators = None
) -> Weights:
    """s_t / sum_j s_j on every valid position: Weighted KD (Guo et al., 2024)."""
    return _proportions(scores, valid, 1.0).to(scores.dtype)


def tip(
    scores: Float[Tensor, "B T 2"],
    valid: Valid,
    fraction: float = 0.2,
    step: int = 0,
    generator: Generators = None,
) -> Weights:
    """1/K on the K highest h + d - h d, where the student is uncertain or the teacher disagrees with it.

    h is the student's entropy and d the reverse KL, each scaled to [0, 1] (the Soft-OR of TIP, arXiv 2604.14084).
    Scaling within the sequence makes the choice independent of how a step is split into batches.
    """
    h, d = (rescale(scores[..., c], valid) for c in range(2))
    # This is h + d - h d, but exactly 1 wherever h or d is 1. Otherwise rounding would break these ties.
    return top_k(1 - (1 - h) * (1 - d), valid, fraction)


def _proportions(scores: Scores, valid: Valid, exponent: float) -> Float[Tensor, "B T"]:
    """s^a / sum s^a over the valid positions, in float64. Uniform in a sequence whose scores are all 0."""
    check_finite(scores, valid)
    positive = torch.where(valid, scores.double().clamp(min=0), 0)
    # Divided by the largest score, so that no power overflows.
    powers = (positive / positive.amax(1, keepdim=True).clamp(min=1e-300)) ** exponent * valid
    all_zero = powers.sum(1, keepdim=True) == 0
    powers = torch.where(all_zero, valid.double(), powers)
    return powers / powers.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def _draw(
    scores: Scores, valid: Valid, fraction: float, generator: Generators, exponent: float, coverage: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four tensors: a mask of the positions that are always taken, the counts of draws at the others, K [B 1], and the
    distribution of the draws."""
    k = budgets(valid, fraction)[:, None]
    top = ranks(scores, valid) < (Fraction(str(coverage)).numerator * k // Fraction(str(coverage)).denominator)
    r = _proportions(scores, valid & ~top, exponent)
    draws = (k - top.sum(1, keepdim=True))[:, 0]
    places = torch.arange(int(draws.max()) if len(draws) else 0, device=draws.device)
    drawn = places < draws[:, None]
    numbers = torch.zeros(drawn.shape, dtype=torch.float64, device=r.device)
    numbers = numbers.masked_scatter(drawn, uniform(draws, generator, torch.float64).to(r.device))
    # Inverse transform. A position of probability 0 has an empty interval, so it is never drawn.
    cumulative = r.cumsum(1)
    hits = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True).clamp(max=r.shape[1] - 1)
    counts = torch.zeros_like(r).scatter_add_(1, hits, drawn.double())
    return top.to(scores.dtype), counts.to(scores.dtype), k, r
