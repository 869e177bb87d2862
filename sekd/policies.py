"""Which positions, how heavy? Each policy maps scores [B T] to weights [B T]; weight 0 is not distilled.

The loss of a sequence is sum_t w_t * l_t, so weights that sum to 1 make it a mean over the chosen rows. With n valid
rows in a sequence and a fraction k, a budget is K = max(1, ceil(k n)) rows, and none where n = 0.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the batch, or one a sequence: then the draws do not depend on how sequences are batched."""


def budgets(valid: Bool[Tensor, "B T"], fraction: float) -> Int[Tensor, " B"]:
    """K of each sequence: the exact ceiling of the decimal that the user wrote, so that 7 % of 100 is 7, not 8."""
    exact = Fraction(str(fraction))
    counts = [max(1, -(-n * exact.numerator // exact.denominator)) if n else 0 for n in valid.sum(1).tolist()]
    return torch.tensor(counts, device=valid.device)


def all_rows(
    scores: Float[Tensor, "B T"],
    valid: Bool[Tensor, "B T"],
    fraction: float = 1.0,
    step: int = 0,
    generator: Generators = None,
) -> Float[Tensor, "B T"]:
    """1/n on every valid row: Full KD (Hinton et al., 2015)."""
    return valid / valid.sum(1, keepdim=True).clamp(min=1)


def top_k(
    scores: Float[Tensor, "B T"],
    valid: Bool[Tensor, "B T"],
    fraction: float = 0.2,
    step: int = 0,
    generator: Generators = None,
) -> Float[Tensor, "B T"]:
    """1/K on the K highest scores of each sequence, ties to the lower index (arXiv 2602.01395, equation 6)."""
    lowest = torch.finfo(scores.dtype).min
    # A valid row must beat every invalid one, whatever its score.
    keys = torch.where(valid, scores.clamp(min=lowest), -torch.inf)
    order = keys.argsort(dim=1, descending=True, stable=True)
    k = budgets(valid, fraction)[:, None]
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return (rank < k) / k.clamp(min=1)


def random(
    scores: Float[Tensor, "B T"],
    valid: Bool[Tensor, "B T"],
    fraction: float = 0.2,
    step: int = 0,
    generator: Generators = None,
) -> Float[Tensor, "B T"]:
    """1/K on K valid rows drawn uniformly, without replacement (RandomPos, arXiv 2602.01395, section 5)."""
    counts = valid.sum(1).tolist()
    if isinstance(generator, Sequence):
        draws = torch.cat([torch.rand(n, generator=g) for n, g in zip(counts, generator, strict=True)])
    else:
        draws = torch.rand(sum(counts), generator=generator)
    keys = torch.zeros(valid.shape, device=valid.device).masked_scatter(valid, draws.to(valid.device))
    return top_k(keys, valid, fraction)


POLICIES: dict[str, Callable[..., Float[Tensor, "B T"]]] = {"all": all_rows, "top_k": top_k, "random": random}

NEEDS_SCORES = frozenset({"top_k"})
"""The policies that look at scores; the others spare the scoring pass."""


def make_policy(name: str, fraction: float = 0.2, **options: float) -> Callable[..., Float[Tensor, "B T"]]:
    """The policy ``name`` with its budget: ``policy(scores, valid, step=0, generator=None) -> weights``.

    Raises:
        ValueError: an unknown name, or a fraction outside (0, 1].
    """
    if name not in POLICIES:
        raise ValueError(f"position_policy {name!r} is unknown; choose one of {', '.join(POLICIES)}")
    if not 0 < fraction <= 1:
        raise ValueError(f"position_fraction {fraction} is outside (0, 1]; write 0.2 for 20 % of the positions")
    return partial(POLICIES[name], fraction=fraction, **options)
