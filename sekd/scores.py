"""How important is a position? Each score maps rows to one float32 number a row, at temperature 1."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Log-probabilities of N rows: what a score may look at."""

    student_logp: Float[Tensor, "N V"]
    targets: Int[Tensor, " N"]
    teacher_logp: Float[Tensor, "N V"] | None = None


def entropy(logp: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """H = -sum p log p of each row, in nats."""
    return -(logp.exp() * logp).sum(-1)


def student_entropy(rows: Rows) -> Float[Tensor, " N"]:
    """H(q): how uncertain the student is (SE-KD, arXiv 2602.01395, section 4)."""
    return entropy(rows.student_logp)


def student_ce(rows: Rows) -> Float[Tensor, " N"]:
    """-log q(y): how surprised the student is by the next token (Wang et al., 2021)."""
    return -rows.student_logp.gather(-1, rows.targets[:, None])[:, 0]


SCORES: dict[str, Callable[[Rows], Float[Tensor, " N"]]] = {
    "student_entropy": student_entropy,
    "student_ce": student_ce,
}

for _score in SCORES.values():
    _score.needs_teacher = False  # type: ignore[attr-defined]
