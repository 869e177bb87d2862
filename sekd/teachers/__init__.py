"""Where the teacher's distributions come from."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from sekd.types import Batch


@runtime_checkable
class Teacher(Protocol):
    """A source of teacher distributions, asked once a batch for its rows and then a chunk at a time for logits."""

    def rows(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the teacher keeps of the N valid rows of the batch: tensors of N rows, small against [N V].

        A teacher that reads the tokens reads those of ``batch.for_teacher``.
        """

    def logits(self, *rows: Tensor) -> Float[Tensor, "N V"]:
        """Logits (or log-probabilities) of a chunk of those rows."""

    def for_scores(self, *rows: Tensor) -> dict[str, Tensor]:
        """What it knows of a chunk of those rows, as the fields of :class:`sekd.scores.Rows`."""
