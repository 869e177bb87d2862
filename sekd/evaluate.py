"""How far is a student from its teacher on held-out rows?"""

import torch
from torch import Tensor, nn

from sekd.distill import Method
from sekd.heads import in_chunks
from sekd.losses import cross_entropy, forward_kl, reverse_kl
from sekd.models import head_of, hidden_states
from sekd.scores import entropy
from sekd.teachers import Teacher
from sekd.types import Batch


@torch.no_grad()
def held_out_sums(student: nn.Module, teacher: Teacher, batch: Batch, method: Method) -> dict[str, Tensor]:
    """Sums over all valid rows, in nats: ``forward_kl``, ``reverse_kl``, ``student_ce``, ``student_entropy``; ``rows``.

    Divide by ``rows`` for the mean a token. Temperature 1, whatever the training used.
    """
    head = head_of(student, method.vocab)

    def of_chunk(rows: Tensor, targets: Tensor, *teacher_rows: Tensor) -> tuple[Tensor, ...]:
        q, p = head(rows).log_softmax(-1), teacher.logits(*teacher_rows).log_softmax(-1)
        return forward_kl(q, p), reverse_kl(q, p), cross_entropy(q, targets), entropy(q)

    rows = (hidden_states(student, batch)[batch.valid], batch.targets[batch.valid], *teacher.rows(batch))
    names = ("forward_kl", "reverse_kl", "student_ce", "student_entropy")
    sums = (column.sum() for column in in_chunks(of_chunk, rows, method.chunk_rows))
    return {**dict(zip(names, sums, strict=True)), "rows": batch.valid.sum()}
