"""Does the sampler's entropy choose the positions that exact entropy would choose?"""

import torch
from torch import Tensor

from sekd.heads import Head, chunked_entropy
from sekd.policies.ranks import Valid, top_k
from sekd.types import Batch, Positions

AGREEMENT_STEPS = 10
"""Optimizer steps between two checks."""


@torch.no_grad()
def measure_agreement(
    head: Head, positions: Positions, batch: Batch, allowed: Valid, fraction: float, chunk_rows: int
) -> dict[str, Tensor]:
    """Overlap of the top positions under exact and under sampler entropy, on the batch's first sequence.

    The top positions are those among the ``allowed`` ones.
    ``agreement`` is the number of positions that both choose. ``agreement_positions`` is the number that exact entropy
    chooses.
    """
    assert batch.student_entropy is not None
    valid = batch.valid[:1]
    exact = torch.zeros(valid.shape, device=positions.device)
    exact = exact.masked_scatter(valid, chunked_entropy(positions.hidden[: int(valid.sum())], head, chunk_rows))
    by_exact, by_sampler = (top_k(scores, allowed[:1], fraction) > 0 for scores in (exact, batch.student_entropy[:1]))
    return {"agreement": (by_exact & by_sampler).sum(), "agreement_positions": by_exact.sum()}
