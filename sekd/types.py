"""The records that travel between modules, and the letters of their shapes.

B sequences, T tokens (T2 where the teacher reads others), V vocabulary, D hidden size, N rows, K classes kept in a row,
U class draws. Row (b, t) holds the two next-token distributions after token t: the teacher's p and the student's q; its
target y is token t + 1. A row is *valid* if its target is supervised. All logs are natural.
"""

from dataclasses import dataclass, fields
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORE = -100
"""The target of a row that is not supervised: padding, prompt, the first token of a packed document."""


@dataclass(frozen=True)
class Batch:
    """Token sequences whose targets are already shifted (by :mod:`sekd.data`, and nowhere else).

    ``attention_mask`` is needed for left padding only. Where it is None, attention is causal within each run of
    consecutive ``position_ids``: positions that restart separate packed documents, and right padding is never seen.
    ``student_entropy`` is what the sampler knew of each valid row of a rollout, if it was asked.
    """

    input_ids: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]
    sample_ids: Int[Tensor, " B"]
    attention_mask: Int[Tensor, "B T"] | None = None
    student_entropy: Float[Tensor, "B T"] | None = None
    teacher_input_ids: Int[Tensor, "B T2"] | None = None
    teacher_targets: Int[Tensor, "B T2"] | None = None
    teacher_position_ids: Int[Tensor, "B T2"] | None = None

    @property
    def for_teacher(self) -> "Batch":
        """What the teacher reads: the same completions behind its own prompts, where it has some, or else the batch.

        Each sequence has as many valid rows in both, in the same order.
        """
        if self.teacher_input_ids is None:
            return self
        assert self.teacher_targets is not None
        assert self.teacher_position_ids is not None
        return Batch(self.teacher_input_ids, self.teacher_targets, self.teacher_position_ids, self.sample_ids)

    @property
    def valid(self) -> Bool[Tensor, "B T"]:
        """Rows whose target is supervised."""
        return self.targets != IGNORE

    @classmethod
    def from_inputs(cls, inputs: dict[str, Any]) -> "Batch":
        """The batch in a Trainer's ``inputs``, which must be a dict to be moved between devices."""
        return cls(**{f.name: inputs[f.name] for f in fields(cls) if f.name in inputs})


@dataclass(frozen=True)
class SparseTargets:
    """A teacher distribution on K of the V classes in each row; unused slots have probability 0 (and any id)."""

    ids: Int[Tensor, "N K"]
    probs: Float[Tensor, "N K"]
