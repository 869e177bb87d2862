"""How do two distributions differ? Each divergence maps rows to one number a row; one function reduces.

The functions take log-probabilities, which their caller has at hand; ``DIVERGENCES`` holds them for logits.
"""

import math
from collections.abc import Callable
from functools import wraps

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sekd.distributions import cross_entropy, kl_divergence

Targets = Int[Tensor, " N"] | None


def forward_kl(
    student_logp: Float[Tensor, "N V"], teacher_logp: Float[Tensor, "N V"], targets: Targets = None
) -> Float[Tensor, " N"]:
    """KL(p || q) of each row, in nats: the student covers the teacher (Hinton et al., 2015)."""
    return kl_divergence(teacher_logp, student_logp)


def reverse_kl(
    student_logp: Float[Tensor, "N V"], teacher_logp: Float[Tensor, "N V"], targets: Targets = None
) -> Float[Tensor, " N"]:
    """KL(q || p) of each row, in nats: the student seeks the teacher's modes (Gu et al., 2024)."""
    return kl_divergence(student_logp, teacher_logp)


def jsd(
    student_logp: Float[Tensor, "N V"], teacher_logp: Float[Tensor, "N V"], targets: Targets = None, beta: float = 0.5
) -> Float[Tensor, " N"]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (Agarwal et al., 2024, section 3).

    ``beta`` lies inside (0, 1); towards 0 it behaves like forward KL, towards 1 like reverse KL.
    """
    mixture = torch.logaddexp(teacher_logp + math.log(beta), student_logp + math.log1p(-beta))
    return beta * kl_divergence(teacher_logp, mixture) + (1 - beta) * kl_divergence(student_logp, mixture)


def skew_kl(
    student_logp: Float[Tensor, "N V"], teacher_logp: Float[Tensor, "N V"], targets: Targets = None, alpha: float = 0.1
) -> Float[Tensor, " N"]:
    """KL(p || alpha p + (1 - alpha) q), bounded by -log alpha (Ko et al., 2024, DistiLLM); alpha inside (0, 1)."""
    mixture = torch.logaddexp(teacher_logp + math.log(alpha), student_logp + math.log1p(-alpha))
    return kl_divergence(teacher_logp, mixture)


def total_variation(
    student_logp: Float[Tensor, "N V"], teacher_logp: Float[Tensor, "N V"], targets: Targets = None
) -> Float[Tensor, " N"]:
    """sum |p - q| / 2 of each row, in [0, 1] (Wen et al., 2023)."""
    return (teacher_logp.exp() - student_logp.exp()).abs().sum(-1) / 2


def split_kl(
    student_logp: Float[Tensor, "N V"], teacher_logp: Float[Tensor, "N V"], targets: Int[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Target and non-target KL: KL(p || q) = TCKD + (1 - p(y)) NCKD (Zhao et al., 2022, equation 5)."""
    p_y, p_rest, p_others = _split(teacher_logp, targets)
    q_y, q_rest, q_others = _split(student_logp, targets)
    target = p_y.exp() * (p_y - q_y) + p_rest.exp() * (p_rest - q_rest)
    return target, kl_divergence(p_others, q_others)


def _split(logp: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(y), log (1 - p(y)), and the distribution of the other classes, none by a subtraction that cancels."""
    y = targets[:, None]
    others = logp.scatter(-1, y, -1e30)  # finite, since 0 times it must be 0
    rest = others.logsumexp(-1, keepdim=True)
    return logp.gather(-1, y)[:, 0], rest[:, 0], (others - rest).scatter(-1, y, -1e30)


def decoupled_kl(
    student_logp: Float[Tensor, "N V"],
    teacher_logp: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    alpha: float = 1.0,
    beta: float | Float[Tensor, " N"] = 8.0,
) -> Float[Tensor, " N"]:
    """alpha TCKD + beta NCKD: what the teacher says of the target, and of the rest (Zhao et al., 2022, equation 7)."""
    target, others = split_kl(student_logp, teacher_logp, targets)
    return alpha * target + beta * others


def at_kd(
    student_logp: Float[Tensor, "N V"],
    teacher_logp: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    factors: Float[Tensor, "N 2"] | None = None,
) -> Float[Tensor, " N"]:
    """Adaptive teaching (Zhong et al., 2024, AT-KD): the easier half of a batch learns the non-target KL only.

    The mean over the rows of a batch is 0.2 times the mean NCKD of its easier half plus 0.8 times the mean TCKD + NCKD
    of its harder half; :func:`sekd.distill.distill` gives all chosen rows of a batch the same weight for it.
    ``factors`` are :func:`at_kd_factors` of the whole batch, where these rows are a chunk of it. A batch is what one
    process computes at once, so ``per_device_train_batch_size`` is part of this method.
    """
    if factors is None:
        factors = at_kd_factors(cross_entropy(teacher_logp, targets))
    target, others = split_kl(student_logp, teacher_logp, targets)
    return factors[:, 0] * target + factors[:, 1] * others


def at_kd_factors(teacher_ce: Float[Tensor, " N"], easy_weight: float = 0.2) -> Float[Tensor, "N 2"]:
    """What each row's TCKD and NCKD count in AT-KD, so that the mean over rows weighs the means of the two halves.

    The harder half are the ceil(N / 2) rows of highest 1 - p(y), ties to the lower index.
    """
    n = len(teacher_ce)
    n_hard = -(-n // 2)
    hard = torch.zeros_like(teacher_ce, dtype=torch.bool)
    hard[teacher_ce.argsort(descending=True, stable=True)[:n_hard]] = True
    others = torch.where(hard, (1 - easy_weight) * n / max(n_hard, 1), easy_weight * n / max(n - n_hard, 1))
    return torch.stack([torch.where(hard, others, 0), others], dim=1)


def _of_logits(divergence: Callable[..., Float[Tensor, " N"]]) -> Callable[..., Float[Tensor, " N"]]:
    @wraps(divergence)
    def normalised(
        student_logits: Float[Tensor, "N V"],
        teacher_logits: Float[Tensor, "N V"],
        targets: Targets = None,
        **options: float,
    ) -> Float[Tensor, " N"]:
        student, teacher = (logits.float().log_softmax(-1) for logits in (student_logits, teacher_logits))
        return divergence(student, teacher, targets, **options)

    return normalised


ON_LOG_PROBABILITIES: dict[str, Callable[..., Float[Tensor, " N"]]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "total_variation": total_variation,
    "decoupled_kl": decoupled_kl,
    "at_kd": at_kd,
}

DIVERGENCES = {name: _of_logits(divergence) for name, divergence in ON_LOG_PROBABILITIES.items()}
"""``DIVERGENCES[name](student_logits, teacher_logits, targets) -> [N]``, in float32."""


def reduce(losses: Float[Tensor, " N"], weights: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """The sum over sequences of sum_t w_t * l_t. Divide by the sequences of the *whole* optimizer step for the loss."""
    return (weights * losses).sum()
