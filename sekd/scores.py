"""How important is a position? Each score maps positions to one float32 number each, at temperature 1.

Definitions after *Rethinking Selective Knowledge Distillation* (arXiv 2602.01395, table 1).
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sekd.distributions import cross_entropy, entropy, kl_divergence


@dataclass(frozen=True)
class Rows:
    """What a score may read of N positions: log-probabilities and next tokens.

    A cache sets ``teacher_entropy`` instead of ``teacher_logp``.
    """

    student_logp: Float[Tensor, "N V"]
    targets: Int[Tensor, " N"]
    teacher_logp: Float[Tensor, "N V"] | None = None
    teacher_entropy: Float[Tensor, " N"] | None = None

    @property
    def teacher(self) -> Float[Tensor, "N V"]:
        """``teacher_logp`` (ValueError without it)."""
        if self.teacher_logp is None:
            raise ValueError("this score needs the teacher: give Rows its teacher_logp")
        return self.teacher_logp


@dataclass(frozen=True)
class Score:
    """A score and its properties, which the rest of the code reads.

    Attributes:
        function: maps :class:`Rows` to one number a position.
        needs_teacher: it reads the teacher's distribution, which costs the teacher's LM head on every valid position.
        in_cache: it is the teacher's entropy, which a teacher cache can hold.
        in_rollouts: it is the student's entropy, which the sampler's log-probabilities give.
    """

    function: Callable[[Rows], Float[Tensor, " N"]]
    needs_teacher: bool = True
    in_cache: bool = False
    in_rollouts: bool = False

    def __call__(self, rows: Rows) -> Float[Tensor, " N"]:
        return self.function(rows)


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
    """KL(q || p): how much probability the student gives to classes that the teacher finds unlikely."""
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


SCORES: dict[str, Score] = {
    "student_entropy": Score(student_entropy, needs_teacher=False, in_rollouts=True),
    "teacher_entropy": Score(teacher_entropy, in_cache=True),
    "student_ce": Score(student_ce, needs_teacher=False),
    "teacher_ce": Score(teacher_ce),
    "kl": Score(kl),
    "reverse_kl": Score(reverse_kl),
    "kl_plus_student_entropy": Score(kl_plus_student_entropy),
    "ce_ratio": Score(ce_ratio),
    "ce_ratio_plus_student_entropy": Score(ce_ratio_plus_student_entropy),
}
"""``SCORES[name](rows) -> [N]``, and ``SCORES[name].needs_teacher``."""


RANDOM = "random"
"""The ``sample_score`` of a random choice. No model scores the samples then."""


def needs_teacher(sample_score: str) -> bool:
    """Whether a ``sample_score``, a name of :data:`SCORES` or :data:`RANDOM`, reads the teacher's distribution."""
    return sample_score != RANDOM and SCORES[sample_score].needs_teacher


def standardize(scores: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """(s - mean) / standard deviation over the valid positions of each sequence; 0 where all scores are equal."""
    n = valid.sum(1, keepdim=True).clamp(min=1)
    centred = scores - scores.where(valid, 0).sum(1, keepdim=True) / n
    deviation = (centred.where(valid, 0).square().sum(1, keepdim=True) / n).sqrt()
    return torch.where(deviation > 0, centred / deviation, 0)


def rescale(scores: Float[Tensor, "B T"], valid: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """(s - min) / (max - min) over the valid positions of each sequence, in [0, 1]; 0 where all scores are equal."""
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

    With ``weights``, the policy reads one score [B T]: each score is normalised within its sequence, then the weighted
    sum is taken (SampledKD). Without weights, the policy reads all C scores [B T C].
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    normalization: str = "none"

    @property
    def needs_teacher(self) -> bool:
        """Whether any of the scores reads the teacher's distribution."""
        return any(SCORES[name].needs_teacher for name in self.names)

    @property
    def in_rollouts(self) -> bool:
        """Whether all of the scores can be computed from the sampler's log-probabilities."""
        return len(self.names) == 1 and SCORES[self.names[0]].in_rollouts

    def score(self, rows: Rows) -> Float[Tensor, "N C"]:
        """Each score of each position."""
        columns = {name: SCORES[name](rows) for name in self.names}
        for name, column in columns.items():
            if column.shape != rows.targets.shape:
                raise ValueError(f"score {name!r} returned shape {[*column.shape]}; it must be [{len(rows.targets)}]")
        return torch.stack([*columns.values()], dim=1)

    def student_entropy(self, scores: Float[Tensor, "N C"], rows: Rows) -> Float[Tensor, " N"]:
        """H(q) of each position, computed only if it is not one of the scores."""
        names = [name for name in self.names if SCORES[name].in_rollouts]
        return scores[:, self.names.index(names[0])] if names else student_entropy(rows)

    def combine(self, scores: Float[Tensor, "B T C"], valid: Bool[Tensor, "B T"]) -> Float[Tensor, "B T *C"]:
        """The scores as the policy reads them: [B T] with weights, else [B T C]."""
        if self.weights is None:
            return scores
        normalize = NORMALIZATIONS[self.normalization]
        return torch.stack([w * normalize(scores[..., c], valid) for c, w in enumerate(self.weights)]).sum(0)


def make_scoring(score: Any, normalization: str = "none") -> Scoring:
    """The scoring of a recipe. ``score`` is one name, or a mapping of several names to weights.

    Raises:
        ValueError: an unknown name, a weight that is not a finite number, or only weights of 0.
    """
    if not isinstance(score, str | Mapping):
        raise ValueError(f"position_score {score!r} must be a name such as kl, or weights such as {{kl: 1.0}}")
    weights = {score: 1.0} if isinstance(score, str) else dict(score)
    for name, weight in weights.items():
        if name not in SCORES:
            raise ValueError(f"position_score {name!r} is unknown; choose from {', '.join(SCORES)}")
        if isinstance(weight, str):  # YAML reads 1e-1 as text
            with suppress(ValueError):
                weights[name] = weight = float(weight)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
            raise ValueError(f"position_score: the weight of {name} is {weight!r}; it must be a finite number")
    if not any(weights.values()):
        raise ValueError(f"position_score {dict(weights)!r}: all weights are 0; set one of them above 0")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"score_normalization {normalization!r} is unknown; choose one of {', '.join(NORMALIZATIONS)}")
    return Scoring(tuple(weights), tuple(map(float, weights.values())), normalization)
