"""Agreement is measured among the positions that the policy may choose."""

import torch

from sekd.eval.agreement import measure_agreement
from sekd.heads import Head
from sekd.policies.ranks import eligible
from sekd.types import Batch, Positions


def test_positions_that_are_skipped_do_not_count():
    """Both entropies have the highest values at the first four positions, and differ after them."""
    rows = 12
    exact = torch.tensor([9.0] * 4 + [8.0, 7.0, 6.0, 5.0] + [1.0] * 4) / 10
    sampler = torch.tensor([9.0] * 4 + [1.0] * 4 + [5.0, 6.0, 7.0, 8.0]) / 10
    # Two classes with logits (0, z): the entropy falls as z grows, so 1 - entropy orders positions like z.
    head, hidden = Head(torch.nn.Linear(1, 2, bias=False)), 10 * (1 - exact)[:, None]
    head.projection.weight.data = torch.tensor([[0.0], [1.0]])
    ids = torch.zeros(1, rows, dtype=torch.long)
    batch = Batch(ids, ids, torch.arange(rows)[None], torch.tensor([0]), student_entropy=sampler[None])
    positions = Positions(hidden, ids[0])
    for skip, fraction, expected in ((0, 1 / 3, 4), (4, 1 / 2, 0)):
        allowed = eligible(batch.valid, skip)
        sums = measure_agreement(head, positions, batch, allowed, fraction, chunk_rows=5)
        assert sums["agreement_positions"] == 4
        assert sums["agreement"] == expected
