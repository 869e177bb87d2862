"""How do two distributions differ? Each divergence maps rows to one number a row; one function reduces.

The functions take log-probabilities, which their caller has at hand; ``DIVERGENCES`` holds them for logits.
"""

import math
from collections.abc import Callable
from functools import wraps

import torch
from jaxtyping import Float, Int
from torch import Tensor


def forward_kl(
    student_logp: Float[Tensor, "N V"], teacher_logp: Float[Tensor, "N V"], targets: Int[Tensor, " N"] | None = None
) -> Float[Tensor, " N"]:
    """KL(p || q) of each row, in nats: the student covers the teacher (Hinton et al., 2015)."""
    return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1)


def reverse_kl(
    student_logp: Float[Tensor, "N V"], teacher_logp: Float[Tensor, "N V"], targets: Int[Tensor, " N"] | None = None
) -> Float[Tensor, " N"]:
    """KL(q || p) of each row, in nats: the student seeks the teacher's modes (Gu et al., 2024)."""
    return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)


def jsd(
    student_logp: Float[Tensor, "N V"],
    teacher_logp: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"] | None = None,
    beta: float = 0.5,
) -> Float[Tensor, " N"]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (Agarwal et al., 2024, section 3).

    ``beta`` lies inside (0, 1); towards 0 it behaves like forward KL, towards 1 like reverse KL.
    """
    mixture = torch.logaddexp(teacher_logp + math.log(beta), student_logp + math.log1p(-beta))
    kl_teacher = (teacher_logp.exp() * (teacher_logp - mixture)).sum(-1)
    kl_student = (student_logp.exp() * (student_logp - mixture)).sum(-1)
    return beta * kl_teacher + (1 - beta) * kl_student


def _of_logits(divergence: Callable[..., Float[Tensor, " N"]]) -> Callable[..., Float[Tensor, " N"]]:
    @wraps(divergence)
    def normalised(
        student_logits: Float[Tensor, "N V"],
        teacher_logits: Float[Tensor, "N V"],
        targets: Int[Tensor, " N"] | None = None,
        **options: float,
    ) -> Float[Tensor, " N"]:
        student, teacher = (logits.float().log_softmax(-1) for logits in (student_logits, teacher_logits))
        return divergence(student, teacher, targets, **options)

    return normalised


ON_LOG_PROBABILITIES: dict[str, Callable[..., Float[Tensor, " N"]]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
}

DIVERGENCES = {name: _of_logits(divergence) for name, divergence in ON_LOG_PROBABILITIES.items()}
"""``DIVERGENCES[name](student_logits, teacher_logits, targets) -> [N]``, in float32."""


def cross_entropy(student_logp: Float[Tensor, "N V"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """-log q(y) of each row, in nats."""
    return -student_logp.gather(-1, targets[:, None])[:, 0]


def reduce(losses: Float[Tensor, " N"], weights: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """The sum over sequences of sum_t w_t * l_t. Divide by the sequences of the *whole* optimizer step for the loss."""
    return (weights * losses).sum()
