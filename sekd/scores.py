"""How important is a position? Each score maps rows to one float32 number a row, at temperature 1.

Definitions after *Rethinking Selective Knowledge Distillation* (arXiv 2602.01395, table 1). ``needs_teacher`` tells
which of them read the teacher's distribution, and so cost its LM head on every valid row.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sekd.distributions import cross_entropy, entropy, kl_divergence


@dataclass(frozen=True)
class Rows:
    """Log-probabilities of N rows: what a score may look at. A cache knows the teacher's entropy alone."""

    student_logp: Float[Tensor, "N V"]
    targets: Int[Tensor, " N"]
    teacher_logp: Float[Tensor, "N V"] | None = None
    teacher_entropy: Float[Tensor, " N"] | None = None

    @property
    def teacher(self) -> Float[Tensor, "N V"]:
        """``teacher_logp``, which a score that needs the teacher cannot do without (ValueError)."""
        if self.teacher_logp is None:
            raise ValueError("this score needs the teacher: give Rows its teacher_logp")
        return self.teacher_logp


class Score(Protocol):
    """A function of rows that says whether it reads the teacher's distribution."""

    needs_teacher: bool

    def __call__(self, rows: Rows) -> Float[Tensor, " N"]: ...


def student_entropy(rows: Rows) -> Float[Tensor, " N"]:
    """H(q): how uncertain the student is (SE-KD, section 4)."""
    return entropy(rows.student_logp)


def teacher_entropy(rows: Rows) -> Float[Tensor, " N"]:
    """H(p): how uncertain the teacher is."""
    return entropy(rows.teacher) if rows.teacher_entropy is None else rows.teacher_entropy


def student_ce(rows: Rows) -> Float[Tensor, " N"]:
    """CE_s = -log q(y): how surprised the student is by the next token (Wang et al., 2021)."""
    return cross_entropy(rows.student_logp, rows.targets)


def teacher_ce(rows: Rows) -> Float[Tensor, " N"]:
    """CE_t = -log p(y): how surprised the teacher is by the next token (Zhong et al., 2024)."""
    return cross_entropy(rows.teacher, rows.targets)


def kl(rows: Rows) -> Float[Tensor, " N"]:
    """KL(p || q): how far the student is from covering the teacher."""
    return kl_divergence(rows.teacher, rows.student_logp)


def reverse_kl(rows: Rows) -> Float[Tensor, " N"]:
    """KL(q || p): how much the student says that the teacher would not."""
    return kl_divergence(rows.student_logp, rows.teacher)


def kl_plus_student_entropy(rows: Rows) -> Float[Tensor, " N"]:
    """KL(p || q) + H(q): discrepancy and uncertainty."""
    return kl(rows) + student_entropy(rows)


def ce_ratio(rows: Rows) -> Float[Tensor, " N"]:
    """CE_s / (CE_t + 1e-6): difficulty for the student beyond the teacher's (He et al., 2025)."""
    return student_ce(rows) / (teacher_ce(rows) + 1e-6)


def ce_ratio_plus_student_entropy(rows: Rows) -> Float[Tensor, " N"]:
    """CE_s / (CE_t + 1e-6) + H(q), in nats: difficulty and uncertainty."""
    return ce_ratio(rows) + student_entropy(rows)


_FUNCTIONS: dict[str, Any] = {
    "student_entropy": student_entropy,
    "teacher_entropy": teacher_entropy,
    "student_ce": student_ce,
    "teacher_ce": teacher_ce,
    "kl": kl,
    "reverse_kl": reverse_kl,
    "kl_plus_student_entropy": kl_plus_student_entropy,
    "ce_ratio": ce_ratio,
    "ce_ratio_plus_student_entropy": ce_ratio_plus_student_entropy,
}


for _name, _function in _FUNCTIONS.items():
    _function.needs_teacher = _name not in ("student_entropy", "student_ce")


SCORES: dict[str, Score] = _FUNCTIONS
"""``SCORES[name](rows) -> [N]``, and ``SCORES[name].needs_teacher``."""


def standardize(scores: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """(s - mean) / standard deviation over the valid rows of each sequence; 0 where they are all equal."""
    n = valid.sum(1, keepdim=True).clamp(min=1)
    centred = scores - scores.where(valid, 0).sum(1, keepdim=True) / n
    deviation = (centred.where(valid, 0).square().sum(1, keepdim=True) / n).sqrt()
    return torch.where(deviation > 0, centred / deviation, 0)


def rescale(scores: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """(s - min) / (max - min) over the valid rows of each sequence, in [0, 1]; 0 where they are all equal."""
    low = scores.where(valid, torch.inf).amin(1, keepdim=True)
    width = scores.where(valid, -torch.inf).amax(1, keepdim=True) - low
    return torch.where(valid & (width > 0), (scores - low) / width, 0)


NORMALIZATIONS: dict[str, Callable[..., Float[Tensor, "B T"]]] = {
    "none": lambda scores, valid: scores,
    "zscore": standardize,
    "minmax": rescale,
}


@dataclass(frozen=True)
class Scoring:
    """The scores that a policy reads.

    With ``weights``, they become one: a weighted sum, each score normalised within its sequence first (SampledKD).
    Without, the policy gets all of them, as [B T C].
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    normalization: str = "none"

    @property
    def needs_teacher(self) -> bool:
        """Whether any of the scores reads the teacher's distribution."""
        return any(SCORES[name].needs_teacher for name in self.names)

    def of(self, rows: Rows) -> Float[Tensor, "N C"]:
        """Each score of each row."""
        return torch.stack([SCORES[name](rows) for name in self.names], dim=1)

    def combine(self, scores: Float[Tensor, "B T C"], valid: Bool[Tensor, "B T"]) -> Float[Tensor, "B T *C"]:
        """What the policy gets."""
        if self.weights is None:
            return scores
        normalize = NORMALIZATIONS[self.normalization]
        return torch.stack([w * normalize(scores[..., c], valid) for c, w in enumerate(self.weights)]).sum(0)


def make_scoring(score: Any, normalization: str = "none") -> Scoring:
    """One score by its name, or a weighted combination of several by a mapping of names to weights.

    Raises:
        ValueError: unknown names, weights that are not finite numbers or all zero.
    """
    if not isinstance(score, str | Mapping):
        raise ValueError(f"position_score {score!r} is neither a name nor weights; write kl, or {{kl: 1.0}}")
    weights = {score: 1.0} if isinstance(score, str) else dict(score)
    for name, weight in weights.items():
        if name not in SCORES:
            raise ValueError(f"position_score {name!r} is unknown; choose from {', '.join(SCORES)}")
        if isinstance(weight, str):  # YAML reads 1e-1 as text
            with suppress(ValueError):
                weights[name] = weight = float(weight)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
            raise ValueError(f"position_score: the weight of {name} is {weight!r}; write a number such as 0.5")
    if not any(weights.values()):
        raise ValueError(f"position_score {dict(weights)!r} has no weight other than 0; write {{student_entropy: 1.0}}")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"score_normalization {normalization!r} is unknown; choose one of {', '.join(NORMALIZATIONS)}")
    return Scoring(tuple(weights), tuple(map(float, weights.values())), normalization)
