"""How do two distributions differ? A divergence gives one number a position.

:func:`reduce` sums them with the policy's weights.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sekd.classes import sparse_forward_kl
from sekd.distributions import cross_entropy, kl_divergence
from sekd.options import Option

Targets = Int[Tensor, " N"] | None


def forward_kl(
    student_logp: Float[Tensor, "N V"], teacher_logp: Float[Tensor, "N V"], targets: Targets = None
) -> Float[Tensor, " N"]:
    """KL(p || q) of each position, in nats: the student covers the teacher (Hinton et al., 2015)."""
    return kl_divergence(teacher_logp, student_logp)


def reverse_kl(
    student_logp: Float[Tensor, "N V"], teacher_logp: Float[Tensor, "N V"], targets: Targets = None
) -> Float[Tensor, " N"]:
    """KL(q || p) of each position, in nats: the student seeks the teacher's modes (Gu et al., 2024)."""
    return kl_divergence(student_logp, teacher_logp)


def jsd(
    student_logp: Float[Tensor, "N V"], teacher_logp: Float[Tensor, "N V"], targets: Targets = None, beta: float = 0.5
) -> Float[Tensor, " N"]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (Agarwal et al., 2024, section 3).

    ``beta`` is inside (0, 1). Near 0 the divergence behaves like forward KL, near 1 like reverse KL.
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
    """sum |p - q| / 2 of each position, in [0, 1] (Wen et al., 2023)."""
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
    """log p(y), log (1 - p(y)), and the distribution of the other classes, without a subtraction that cancels."""
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
    """alpha TCKD + beta NCKD: the teacher on the target, and on the other classes (Zhao et al., 2022, equation 7)."""
    target, others = split_kl(student_logp, teacher_logp, targets)
    return alpha * target + beta * others


def at_kd(
    student_logp: Float[Tensor, "N V"],
    teacher_logp: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    factors: Float[Tensor, "N 2"] | None = None,
) -> Float[Tensor, " N"]:
    """Adaptive teaching (Zhong et al., 2024, AT-KD): the easier half of a batch learns the non-target KL only.

    The mean over the positions of a batch is 0.2 times the mean NCKD of its easier half plus 0.8 times the mean
    TCKD + NCKD of its harder half. These positions may be a chunk of the batch. Then ``factors`` must be their
    part of :func:`at_kd_factors` of the whole batch. A batch is one process's micro-batch, so the result depends on
    ``per_device_train_batch_size``.
    """
    if factors is None:
        factors = at_kd_factors(cross_entropy(teacher_logp, targets))
    target, others = split_kl(student_logp, teacher_logp, targets)
    return factors[:, 0] * target + factors[:, 1] * others


def at_kd_factors(teacher_ce: Float[Tensor, " N"], easy_weight: float = 0.2) -> Float[Tensor, "N 2"]:
    """Factors of TCKD and NCKD at each position in AT-KD.

    With them, the mean over all positions is the weighted sum of the means of both halves.

    The harder half is the ceil(N / 2) positions of highest 1 - p(y), ties to the lower index.
    """
    n = len(teacher_ce)
    n_hard = -(-n // 2)
    hard = torch.zeros_like(teacher_ce, dtype=torch.bool)
    hard[teacher_ce.argsort(descending=True, stable=True)[:n_hard]] = True
    others = torch.where(hard, (1 - easy_weight) * n / max(n_hard, 1), easy_weight * n / max(n - n_hard, 1))
    return torch.stack([torch.where(hard, others, 0), others], dim=1)


@dataclass(frozen=True)
class Divergence:
    """A divergence and its properties, which the rest of the code reads.

    Attributes:
        on_logp: ``(student_logp [N V], teacher_logp [N V], targets [N], *factors, **options) -> [N]``, all classes.
        sparse: ``(student_logp [N K], SparseTargets, **options) -> [N]``, estimated from sampled classes. Without it,
            class selection is refused.
        factors: ``teacher_ce [N] -> [N F]``, computed on all chosen positions of a batch before the loss. ``on_logp``
            gets the part of its positions.
        mean_over: ``sequence``: the policy's weights apply. ``batch``: all chosen positions of a batch weigh the same.
        held_out: the evaluation metric that becomes ``eval_loss``.
        options: by the name of the parameter.
        check: ``(**options)`` raises ValueError for options that are invalid together.
    """

    on_logp: Callable[..., Float[Tensor, " N"]]
    sparse: Callable[..., Float[Tensor, " N"]] | None = None
    factors: Callable[[Tensor], Tensor] | None = None
    mean_over: str = "sequence"
    held_out: str = "forward_kl"
    options: Mapping[str, Option] = field(default_factory=dict)
    check: Callable[..., None] | None = None

    def __post_init__(self) -> None:
        if self.mean_over not in ("sequence", "batch"):
            raise ValueError(f"Divergence: mean_over {self.mean_over!r} must be 'sequence' or 'batch'")
        if self.factors is not None and self.sparse is not None:
            raise ValueError("Divergence: factors need all classes, so a divergence with them has no sparse form")

    @property
    def reads_batch(self) -> bool:
        """Whether the loss of a position depends on the other positions of its batch."""
        return self.factors is not None or self.mean_over == "batch"

    def __call__(
        self,
        student_logits: Float[Tensor, "N V"],
        teacher_logits: Float[Tensor, "N V"],
        targets: Targets = None,
        **options: float,
    ) -> Float[Tensor, " N"]:
        """The divergence of logits, computed in float32."""
        student, teacher = (logits.float().log_softmax(-1) for logits in (student_logits, teacher_logits))
        return self.on_logp(student, teacher, targets, **options)

    def with_options(self, **options: float) -> "Divergence":
        """The same divergence with these options."""
        if not options:
            return self
        sparse = None if self.sparse is None else partial(self.sparse, **options)
        return replace(self, on_logp=partial(self.on_logp, **options), sparse=sparse)


def _refuse_no_loss(alpha: float, beta: float) -> None:
    if alpha == beta == 0:
        raise ValueError("decoupled_alpha and decoupled_beta are both 0, which leaves no loss; set one of them above 0")


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(forward_kl, sparse=sparse_forward_kl),
    "reverse_kl": Divergence(reverse_kl, held_out="reverse_kl"),
    "jsd": Divergence(
        jsd,
        options={
            "beta": Option(
                field="jsd_beta",
                default=0.5,
                is_valid=lambda v: 0 < v < 1,
                hint="is outside (0, 1); at the limits choose divergence: forward_kl or reverse_kl",
                help="beta of divergence jsd, inside (0, 1).",
            )
        },
    ),
    "skew_kl": Divergence(
        skew_kl,
        options={
            "alpha": Option(
                field="skew_alpha",
                default=0.1,
                is_valid=lambda v: 0 < v < 1,
                hint="is outside (0, 1); 0 is forward_kl, and 1 has no loss",
                help="alpha of divergence skew_kl, inside (0, 1).",
            )
        },
    ),
    "total_variation": Divergence(total_variation),
    "decoupled_kl": Divergence(
        decoupled_kl,
        check=_refuse_no_loss,
        options={
            "alpha": Option(
                field="decoupled_alpha",
                default=1.0,
                is_valid=lambda v: v >= 0,
                hint="must not be negative; 0 leaves that part out",
                help="Weight of decoupled_kl's target part.",
            ),
            "beta": Option(
                field="decoupled_beta",
                default=8.0,
                is_valid=lambda v: v >= 0,
                hint="must not be negative; 0 leaves that part out",
                help="Weight of decoupled_kl's non-target part.",
            ),
        },
    ),
    "at_kd": Divergence(at_kd, factors=at_kd_factors, mean_over="batch"),
}
"""``DIVERGENCES[name](student_logits, teacher_logits, targets) -> [N]``."""


def mean_over_batch(weights: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Equal weights of the chosen positions. The mean over sequences then is the mean over these positions."""
    chosen = weights > 0
    return chosen * valid.any(1).sum() / chosen.sum().clamp(min=1)


MEANS: dict[str, Callable[..., Float[Tensor, "B T"]]] = {
    "sequence": lambda weights, valid: weights,
    "batch": mean_over_batch,
    "step": lambda weights, valid: weights,  # the policy has computed the weights of such a mean
}
"""What the loss is a mean over, from narrow to wide, and how the loss's weights follow from the policy's."""


def reduce(losses: Float[Tensor, " N"], weights: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """The sum of w_t * l_t. Dividing it by the number of sequences of the *whole* optimizer step gives the loss."""
    return (weights * losses).sum()
