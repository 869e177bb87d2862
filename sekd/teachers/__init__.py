"""Where the teacher's distributions come from."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sekd.classes import ClassSelection
from sekd.teachers.live import LiveTeacher, ModelSource
from sekd.types import Batch, DenseTargets, Positions, SparseTargets, TeacherState

__all__ = ["LiveTeacher", "ModelSource", "Teacher", "TeacherSource"]


@runtime_checkable
class Teacher(Protocol):
    """A source of teacher distributions. It reads each batch once, then gives targets for the chosen positions only."""

    has_logits: bool
    """Whether it has the distribution over all classes at any position. Evaluation needs that."""

    def read(self, batch: Batch) -> TeacherState:
        """What the teacher keeps of the batch's N valid positions. It reads the tokens of ``batch.for_teacher``."""

    def score_inputs(self, state: TeacherState) -> dict[str, Tensor]:
        """The teacher's fields of :class:`sekd.scores.Rows` for a chunk of positions: what scores may read."""

    def logits(self, state: TeacherState) -> Tensor:
        """Logits [N V] of a chunk of positions, where ``has_logits``."""

    def targets(
        self,
        positions: Positions,
        classes: ClassSelection,
        temperature: float,
        draw: Callable[[], Tensor],
        chunk_rows: int,
    ) -> DenseTargets | SparseTargets:
        """The targets at the chosen positions. Classes are sampled by the uniform numbers [N U] of ``draw()``."""


@runtime_checkable
class TeacherSource(Protocol):
    """Gets a run its teacher in three calls: check, load, connect. Checks come first, and weights are loaded late."""

    model: PreTrainedModel | None
    """The teacher's model once :meth:`load` has run; None for a source without a model."""

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ValueError if this teacher cannot teach a student with this tokenizer."""

    def load(self, attention: str | None) -> None:
        """Load the weights, with the attention implementation of the student."""

    def connect(self, student: nn.Module, dataset: Any, packed: bool) -> tuple[Teacher, int]:
        """The teacher for this student and these prepared samples, and the number of classes that both models share."""

    def describe(self) -> Any:
        """What tells this teacher from another one, as JSON, once it is loaded. A resumed run must have the same."""
