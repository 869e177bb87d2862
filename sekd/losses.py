"""How do two distributions differ? Each divergence maps rows of logits to one number a row; one function reduces.

Divergences take logits or log-probabilities alike (the softmax is theirs) and work in float32.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def forward_kl(
    student_logits: Float[Tensor, "N V"], teacher_logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"] | None = None
) -> Float[Tensor, " N"]:
    """KL(p || q) of each row, in nats: the student covers the teacher (Hinton et al., 2015)."""
    student, teacher = _log_softmax(student_logits), _log_softmax(teacher_logits)
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(
    student_logits: Float[Tensor, "N V"], teacher_logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"] | None = None
) -> Float[Tensor, " N"]:
    """KL(q || p) of each row, in nats: the student seeks the teacher's modes (Gu et al., 2024)."""
    return forward_kl(teacher_logits, student_logits)


def jsd(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"] | None = None,
    beta: float = 0.5,
) -> Float[Tensor, " N"]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (Agarwal et al., 2024, section 3).

    ``beta`` lies inside (0, 1); towards 0 it behaves like forward KL, towards 1 like reverse KL.
    """
    student, teacher = _log_softmax(student_logits), _log_softmax(teacher_logits)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    kl_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    kl_student = (student.exp() * (student - mixture)).sum(-1)
    return beta * kl_teacher + (1 - beta) * kl_student


DIVERGENCES: dict[str, Callable[..., Float[Tensor, " N"]]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
}


def cross_entropy(student_logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """-log q(y) of each row, in nats."""
    return F.cross_entropy(student_logits.float(), targets, reduction="none")


def reduce(losses: Float[Tensor, " N"], weights: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """The sum over sequences of sum_t w_t * l_t. Divide by the sequences of the *whole* optimizer step for the loss."""
    return (weights * losses).sum()


def _log_softmax(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    return logits.float().log_softmax(-1)
