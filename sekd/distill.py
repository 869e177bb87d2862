"""The method on one screen: hidden states -> scores -> weights -> rows of loss -> their weighted sum.

Selective knowledge distillation (arXiv 2602.01395, equations 3 to 5). The student's backbone runs once, with a graph.
Its head runs over every valid row without a graph to score positions, and with a graph over the chosen rows only; the
teacher's head runs over the chosen rows only. Nothing of size B*T*V exists at any time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sekd.heads import Head, in_chunks
from sekd.losses import cross_entropy, reduce
from sekd.models import head_of, hidden_states
from sekd.policies import Generators
from sekd.scores import Rows, entropy, student_entropy
from sekd.teachers import Teacher
from sekd.types import Batch


@dataclass(frozen=True)
class Method:
    """The choices of one distillation: which rows, and what is minimised on them.

    ``score`` is None where the policy looks at none; ``divergence`` takes log-probabilities. A row's loss is
    ``kd_weight * temperature^2 * D(p_T, q_T) + (1 - kd_weight) * CE``.
    """

    score: Callable[[Rows], Float[Tensor, " N"]] | None
    policy: Callable[..., Float[Tensor, "B T"]]
    divergence: Callable[..., Float[Tensor, " N"]]
    kd_weight: float = 1.0
    temperature: float = 1.0
    vocab: int | None = None
    chunk_rows: int = 256


def distill(
    student: nn.Module, teacher: Teacher, batch: Batch, method: Method, step: int = 0, generator: Generators = None
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The loss of a batch, *summed* over its sequences, and sums for the metrics.

    Divide by the number of sequences in the whole optimizer step. Call it inside the student's wrappers
    (:func:`sekd.models.run_inside`). The sums: ``tokens`` (padding included), ``rows`` (valid ones), ``entropy`` over
    ``entropy_rows`` (all valid rows; the chosen ones where no score was needed), and over ``selected_rows``
    ``selected_entropy`` and ``divergence``.
    """
    head = head_of(student, method.vocab)
    rows = hidden_states(student, batch)[batch.valid]  # [N D], with graph
    targets = batch.targets[batch.valid]  # [N]

    scores, entropies = torch.zeros(batch.valid.shape, device=rows.device), None
    if method.score is not None:
        row_scores, entropies = score_rows(head, rows, targets, method.score, method.chunk_rows)  # [N], no graph
        scores = scores.masked_scatter(batch.valid, row_scores)  # [B T]
    weights = method.policy(scores, batch.valid, step=step, generator=generator)[batch.valid]  # [N]
    chosen = weights > 0

    losses, divergences, selected_entropies = row_losses(
        head, teacher, rows[chosen], targets[chosen], tuple(r[chosen] for r in teacher.rows(batch)), method
    )
    if entropies is None:
        entropies = selected_entropies
    return reduce(losses, weights[chosen]), {
        "tokens": torch.tensor(batch.input_ids.numel(), device=rows.device),
        "rows": batch.valid.sum(),
        "entropy_rows": torch.tensor(len(entropies), device=rows.device),
        "entropy": entropies.sum(),
        "selected_rows": chosen.sum(),
        "selected_entropy": selected_entropies.sum(),
        "divergence": divergences.sum(),
    }


@torch.no_grad()
def score_rows(
    head: Head,
    rows: Float[Tensor, "N D"],
    targets: Int[Tensor, " N"],
    score: Callable[[Rows], Float[Tensor, " N"]],
    chunk_rows: int,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """The score and the student's entropy of each row."""

    def of_chunk(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        q = head(rows).log_softmax(-1)
        scores = score(Rows(q, targets))
        return scores, scores if score is student_entropy else entropy(q)

    scores, entropies = in_chunks(of_chunk, (rows, targets), chunk_rows)
    return scores, entropies


def row_losses(
    head: Head,
    teacher: Teacher,
    rows: Float[Tensor, "N D"],
    targets: Int[Tensor, " N"],
    teacher_rows: tuple[Tensor, ...],
    method: Method,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Loss (with graph), divergence and student entropy of each row."""

    def of_chunk(rows: Tensor, targets: Tensor, *teacher_rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, p = head(rows).log_softmax(-1), teacher.logits(*teacher_rows).log_softmax(-1)
        T = method.temperature
        q_T, p_T = (q, p) if T == 1 else ((q / T).log_softmax(-1), (p / T).log_softmax(-1))
        divergence = method.divergence(q_T, p_T, targets)
        loss = method.kd_weight * T**2 * divergence
        if method.kd_weight < 1:
            loss = loss + (1 - method.kd_weight) * cross_entropy(q, targets)
        return loss, divergence.detach(), entropy(q.detach())

    losses, divergences, entropies = in_chunks(of_chunk, (rows, targets, *teacher_rows), method.chunk_rows)
    return losses, divergences, entropies
