"""How far is a student from its teacher on held-out rows?"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sekd.distill import Method
from sekd.distributions import cross_entropy, entropy
from sekd.heads import in_chunks
from sekd.losses import forward_kl, reverse_kl
from sekd.models import get_head, hidden_states
from sekd.teachers import Teacher
from sekd.types import Batch

MEANS = ("student_ce", "student_entropy", "forward_kl", "reverse_kl")
BINS = 15
"""Bins of confidence in the expected calibration error."""


@torch.no_grad()
def held_out_sums(student: nn.Module, teacher: Teacher | None, batch: Batch, method: Method) -> dict[str, Tensor]:
    """Sums over all valid rows, in nats: ``student_ce``, ``student_entropy``, and with a teacher ``forward_kl`` and
    ``reverse_kl``; ``rows``; and ``calibration`` [BINS 3], the rows, confidences and hits of the likeliest token by
    confidence.

    Divide by ``rows`` for the mean a token. Temperature 1, whatever the training used.
    """
    head = get_head(student, method.vocab).in_autocast_dtype()

    def of_chunk(rows: Tensor, targets: Tensor, *teacher_rows: Tensor) -> tuple[Tensor, ...]:
        q = head(rows).log_softmax(-1)
        confidence, guess = q.max(-1)
        columns = confidence.exp(), guess == targets, cross_entropy(q, targets), entropy(q)
        if teacher is None:
            return columns
        p = teacher.logits(*teacher_rows).log_softmax(-1)
        return *columns, forward_kl(q, p), reverse_kl(q, p)

    rows = (hidden_states(student, batch)[batch.valid], batch.targets[batch.valid])
    confidence, hit, *columns = in_chunks(of_chunk, rows + (teacher.rows(batch) if teacher else ()), method.chunk_rows)
    sums = {name: column.sum() for name, column in zip(MEANS, columns, strict=False)}
    in_bin = (confidence * BINS).long().clamp(max=BINS - 1)
    table = torch.stack([torch.ones_like(confidence), confidence, hit.float()], dim=1)
    calibration = torch.zeros(BINS, 3, device=table.device).index_add_(0, in_bin, table)
    return {**sums, "rows": batch.valid.sum(), "calibration": calibration}


def compute_metrics(sums: dict[str, Any]) -> dict[str, float]:
    """Means a row, ``perplexity`` = exp(student_ce), and ``ece``: sum over bins of |hits - confidence| / rows (Guo et
    al., 2017)."""
    rows = max(sums["rows"], 1)
    found = {name: sums[name] / rows for name in MEANS if name in sums}
    found["perplexity"] = math.exp(min(found["student_ce"], 700))
    found["ece"] = sum(abs(hits - confidence) for _, confidence, hits in sums["calibration"]) / rows
    return {**found, "rows": rows}
