"""Where the teacher's distributions come from."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sekd.models import head_of, hidden_states
from sekd.types import Batch


@runtime_checkable
class Teacher(Protocol):
    """A source of teacher distributions, asked once a batch for its rows and then a chunk at a time for logits."""

    def rows(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the teacher keeps of the N valid rows of the batch: tensors of N rows, small against [N V]."""

    def logits(self, *rows: Tensor) -> Float[Tensor, "N V"]:
        """Logits (or log-probabilities) of a chunk of those rows."""


class LiveTeacher:
    """A teacher model in memory: one backbone pass a batch; its head reads only the rows that are asked for."""

    def __init__(self, model: nn.Module, vocab: int | None = None) -> None:
        self.model = model
        self.head = head_of(model, vocab)

    @torch.no_grad()
    def rows(self, batch: Batch) -> tuple[Float[Tensor, "N D"]]:
        return (hidden_states(self.model, batch)[batch.valid],)

    @torch.no_grad()
    def logits(self, *rows: Tensor) -> Float[Tensor, "N V"]:
        (hidden,) = rows
        return self.head(hidden)
