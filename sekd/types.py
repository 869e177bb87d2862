"""The records that travel between modules, and the letters of their shapes.

B sequences, T tokens (T2 in the teacher's own context), V vocabulary, D hidden size, N positions, K classes kept at a
position, U class draws. Position (b, t) holds the two next-token distributions after token t: the teacher's p and the
student's q. Its target y is token t + 1. A position is *valid* if its target is supervised. All logs are natural.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORE = -100
"""The target of an invalid position: padding, prompt, or the first token of a packed document."""

TeacherState = dict[str, Tensor]
"""What a teacher keeps of N positions: tensors of N entries by name, small compared with [N V]."""


@dataclass(frozen=True)
class Batch:
    """Token sequences whose targets are already shifted (by :mod:`sekd.data.batch` and nowhere else).

    ``attention_mask`` is needed for left padding only. Without it, attention is causal within each document. A document
    begins where ``position_ids`` restart. Padding on the right comes after everything, so it is never seen.
    ``student_entropy`` is the entropy of the sampler's distribution at each valid position of a rollout
    (``score_source: rollout``). The ``teacher_`` fields are set if the teacher's prompts differ from the student's.
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
        """The teacher's batch: the same completions after the teacher's own prompts. Without such prompts, this batch.

        Each sequence has equally many valid positions in both batches, in the same order.
        """
        if self.teacher_input_ids is None:
            return self
        assert self.teacher_targets is not None
        assert self.teacher_position_ids is not None
        return Batch(self.teacher_input_ids, self.teacher_targets, self.teacher_position_ids, self.sample_ids)

    @property
    def valid(self) -> Bool[Tensor, "B T"]:
        """Positions whose target is supervised."""
        return self.targets != IGNORE

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        tensors = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    @classmethod
    def from_inputs(cls, inputs: dict[str, Any]) -> "Batch":
        """The batch in a Trainer's ``inputs``: a dict, which a Trainer can move between devices."""
        return cls(**{f.name: inputs[f.name] for f in fields(cls) if f.name in inputs})


Record = TypeVar("Record", bound="PerPosition")


class PerPosition:
    """Base class of records of N positions. A mask or a split applies to every tensor of the record."""

    def __len__(self) -> int:
        return max(len(tensor) for value in vars(self).values() for tensor in _tensors(value))

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(tensor.device for value in vars(self).values() for tensor in _tensors(value))

    def __getitem__(self: Record, mask: Bool[Tensor, " N"]) -> Record:
        return self._map(lambda tensor: tensor[mask])

    def split(self: Record, size: int) -> list[Record]:
        """Consecutive parts of at most ``size`` positions. A record without positions gives one empty part."""
        number = max(1, -(-len(self) // size))
        fields = {name: _split(value, size, number) for name, value in vars(self).items()}
        return [type(self)(**{name: parts[i] for name, parts in fields.items()}) for i in range(number)]

    def compute(self: Record) -> Record:
        """The same record, with its lazy values computed."""
        return self

    def _map(self: Record, function: Callable[[Tensor], Tensor]) -> Record:
        changed = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                value = function(value)
            elif isinstance(value, dict):
                value = {key: function(tensor) for key, tensor in value.items()}
            changed[name] = value
        return type(self)(**changed)


def _split(value: Any, size: int, number: int) -> Sequence[Any]:
    """``number`` parts of a field: of a tensor, of each tensor in a dict, or the same object again."""
    if isinstance(value, Tensor):
        return value.split(size)
    if isinstance(value, dict):
        parts = {key: tensor.split(size) for key, tensor in value.items()}
        return [{key: part[i] for key, part in parts.items()} for i in range(number)]
    return [value] * number


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [*value.values()] if isinstance(value, dict) else []


@dataclass(frozen=True)
class Positions(PerPosition):
    """N positions: the student's last hidden states, the next tokens, and what the teacher keeps of each."""

    hidden: Float[Tensor, "N D"]
    targets: Int[Tensor, " N"]
    teacher: TeacherState = field(default_factory=dict)


@dataclass(frozen=True)
class DenseTargets(PerPosition):
    """The teacher's whole distribution at N positions. Log-probabilities [N V] are computed one chunk at a time.

    ``project`` is the teacher's head without what :meth:`sekd.heads.Head.finish` does. It gives the logits in the
    teacher's own dtype.
    """

    state: TeacherState
    project: Callable[[TeacherState], Float[Tensor, "N V"]]
    finish: Callable[[Float[Tensor, "N V"]], Float[Tensor, "N V"]]

    def log_probs(self, temperature: float = 1.0) -> Float[Tensor, "N V"]:
        """log p of every class, at ``temperature``."""
        return at_temperature(self.finish(self.project(self.state)).log_softmax(-1), temperature)

    def compute(self) -> "DenseTargets":
        return DenseTargets({"projected": self.project(self.state)}, lambda state: state["projected"], self.finish)

    def compare(
        self, divergence: Any, student_logp: Float[Tensor, "N V"], targets: Tensor, temperature: float, *factors: Tensor
    ) -> Float[Tensor, " N"]:
        """The :class:`sekd.losses.Divergence` at each position. ``student_logp`` is at ``temperature`` already."""
        return divergence.on_logp(student_logp, self.log_probs(temperature), targets, *factors)


@dataclass(frozen=True)
class SparseTargets(PerPosition):
    """A teacher distribution on K of the V classes at N positions; unused slots have probability 0 (and any id).

    ``probs`` are at the temperature of the distillation.
    """

    ids: Int[Tensor, "N K"]
    probs: Float[Tensor, "N K"]

    def compare(
        self, divergence: Any, student_logp: Float[Tensor, "N V"], targets: Tensor, temperature: float
    ) -> Float[Tensor, " N"]:
        """As :meth:`DenseTargets.compare`, on the kept classes."""
        return divergence.sparse(student_logp.gather(1, self.ids), self)


def at_temperature(logp: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
    """Log-probabilities at ``temperature``, from those at temperature 1."""
    return logp if temperature == 1 else (logp / temperature).log_softmax(-1)
