"""Which positions, how heavy? Each policy maps scores [B T] to weights [B T]; weight 0 is not distilled.

The loss of a sequence is sum_t w_t * l_t, so weights that sum to 1 make it a mean over the chosen rows. With n valid
rows in a sequence and a fraction k, a budget is K = max(1, ceil(k n)) rows, and none where n = 0. Definitions after
arXiv 2602.01395, section 5 and appendices A and D.
"""

import inspect
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sekd.policies.bandit import FEATURES
from sekd.policies.gls import STATEFUL
from sekd.policies.ranks import Generators, Scores, Valid, Weights, budgets, check_finite, ranks, top_k, uniform
from sekd.scores import rescale


def all_rows(
    scores: Scores, valid: Valid, fraction: float = 1.0, step: int = 0, generator: Generators = None
) -> Weights:
    """1/n on every valid row: Full KD (Hinton et al., 2015)."""
    return valid / valid.sum(1, keepdim=True).clamp(min=1)


def prefix(scores: Scores, valid: Valid, fraction: float = 0.2, step: int = 0, generator: Generators = None) -> Weights:
    """1/K on the first K valid rows of a sequence, packed or not: prefix truncation (arXiv 2602.15260)."""
    k = budgets(valid, fraction)[:, None]
    return (valid & (valid.cumsum(1) <= k)) / k.clamp(min=1)


def random(scores: Scores, valid: Valid, fraction: float = 0.2, step: int = 0, generator: Generators = None) -> Weights:
    """1/K on K valid rows drawn uniformly, without replacement (RandomPos, arXiv 2602.01395, section 5)."""
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
    """1/K on a window of K rows in ascending order of score, which moves from the easiest to the hardest.

    It starts at floor((n - K) * phase) with phase = min(1, step / steps) (Feng et al., 2024; arXiv 2602.01395,
    section 5), ties in the order of positions.
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
    """c_t / K, with c_t the count of row t among K draws with replacement from r(t) = s_t^a / sum_j s_j^a.

    Unbiased for Weighted KD (arXiv 2602.01395, appendix A). ``exponent`` a below 1 flattens r (their 1/T), and
    ``coverage`` spends that part of the budget, rounded down, on the highest scores at 1/K each and draws the rest
    among the other rows (both appendix D).
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

    With ``coverage``, the rows that are sure to be taken weigh 1/n, so it stays unbiased. A score of 0 is never drawn.
    """
    top, counts, k, r = _draw(scores, valid, fraction, generator, exponent, coverage)
    n = valid.sum(1, keepdim=True).clamp(min=1)
    drawn = counts / ((k - top.sum(1, keepdim=True)).clamp(min=1) * n * r.where(counts > 0, 1))
    return (top / n + drawn).to(scores.dtype)


def weighted(
    scores: Scores, valid: Valid, fraction: float = 1.0, step: int = 0, generator: Generators = None
) -> Weights:
    """s_t / sum_j s_j on every valid row: Weighted KD (Guo et al., 2024)."""
    return _proportions(scores, valid, 1.0).to(scores.dtype)


def tip(
    scores: Float[Tensor, "B T 2"],
    valid: Valid,
    fraction: float = 0.2,
    step: int = 0,
    generator: Generators = None,
) -> Weights:
    """1/K on the K rows of highest h + d - h d: uncertain rows, or confident ones that the teacher contradicts.

    h is the student's entropy and d the reverse KL, each scaled to [0, 1] (the Soft-OR of TIP, arXiv 2604.14084, here
    scaled within the sequence, so that a step's choice does not depend on how it is split into batches).
    """
    h, d = (rescale(scores[..., c], valid) for c in range(2))
    return top_k(h + d - h * d, valid, fraction)


POLICIES: dict[str, Callable[..., Any]] = {
    "all": all_rows,
    "top_k": top_k,
    "random": random,
    "prefix": prefix,
    "curriculum": curriculum,
    "pos_rs": pos_rs,
    "pos_rs_corrected": pos_rs_corrected,
    "weighted": weighted,
    "tip": tip,
    **STATEFUL,
}

READS: dict[str, tuple[str, ...]] = {
    "all": (),
    "random": (),
    "prefix": (),
    "tip": ("student_entropy", "reverse_kl"),
    "bandit": FEATURES,
}
"""The scores that a policy reads where it does not read ``position_score``; without any, the scoring pass is spared."""

OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "steps": (lambda v: v >= 1, "must be at least 1"),
    "queue_size": (lambda v: 1 <= v <= 10_000_000, "must be from 1 to 10,000,000"),
    "exponent": (lambda v: v >= 0, "must not be negative; 1 draws in proportion to the score, 0 uniformly"),
    "coverage": (lambda v: 0 <= v < 1, "is outside [0, 1); at 1 choose position_policy: top_k"),
    "alpha": (lambda v: v >= 0, "must not be negative; 0 never explores"),
    "ridge": (lambda v: v > 0, "must be above 0"),
}

NEEDS_POSITIVE = frozenset({"pos_rs", "pos_rs_corrected", "weighted"})
"""The policies that take scores for proportions, which must not be negative."""


def make_policy(name: str, fraction: float = 0.2, **options: Any) -> Callable[..., Weights]:
    """The policy ``name`` with its budget: ``policy(scores, valid, step=0, generator=None) -> weights``.

    Raises:
        ValueError: an unknown name, a fraction outside (0, 1], or an option outside its range.
    """
    if name not in POLICIES:
        raise ValueError(f"position_policy {name!r} is unknown; choose one of {', '.join(POLICIES)}")
    if not 0 < fraction <= 1:
        raise ValueError(f"position_fraction {fraction} is outside (0, 1]; write 0.2 for 20 % of the positions")
    for option, value in options.items():
        if option not in options_of(name):
            raise ValueError(f"position_policy {name!r} has no option {option!r}; it has {options_of(name) or 'none'}")
        check_option(option, value, option)
    policy = POLICIES[name]
    return policy(fraction, **options) if isinstance(policy, type) else partial(policy, fraction=fraction, **options)


def options_of(name: str) -> list[str]:
    """The options of a policy beyond its budget."""
    return [option for option in inspect.signature(POLICIES[name]).parameters if option in OPTIONS]


def check_option(option: str, value: Any, label: str) -> None:
    """Raise ValueError, with ``label`` for the option's name, if a policy cannot work with this value."""
    within, remedy = OPTIONS[option]
    if not within(value):
        raise ValueError(f"{label} {value} {remedy}")


def _proportions(scores: Scores, valid: Valid, exponent: float) -> Float[Tensor, "B T"]:
    """s^a / sum s^a over the valid rows, in float64; uniform where all scores are 0."""
    check_finite(scores, valid)
    positive = torch.where(valid, scores.double().clamp(min=0), 0)
    # Relative to the largest, so that no power overflows.
    powers = (positive / positive.amax(1, keepdim=True).clamp(min=1e-300)) ** exponent * valid
    all_zero = powers.sum(1, keepdim=True) == 0
    powers = torch.where(all_zero, valid.double(), powers)
    return powers / powers.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def _draw(
    scores: Scores, valid: Valid, fraction: float, generator: Generators, exponent: float, coverage: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows that are sure to be taken, counts of the draws among the others, K [B 1], and those draws' distribution."""
    k = budgets(valid, fraction)[:, None]
    top = ranks(scores, valid) < (Fraction(str(coverage)).numerator * k // Fraction(str(coverage)).denominator)
    r = _proportions(scores, valid & ~top, exponent)
    draws = (k - top.sum(1, keepdim=True))[:, 0]
    places = torch.arange(int(draws.max()) if len(draws) else 0, device=draws.device)
    drawn = places < draws[:, None]
    numbers = torch.zeros(drawn.shape, dtype=torch.float64, device=r.device)
    numbers = numbers.masked_scatter(drawn, uniform(draws, generator, torch.float64).to(r.device))
    # Inverse transform: a row of probability 0 spans nothing, so it is never hit.
    cumulative = r.cumsum(1)
    rows = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True).clamp(max=r.shape[1] - 1)
    counts = torch.zeros_like(r).scatter_add_(1, rows, drawn.double())
    return top.to(scores.dtype), counts.to(scores.dtype), k, r
