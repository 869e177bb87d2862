"""A teacher model in memory."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sekd.models import get_head, hidden_states
from sekd.types import Batch


class LiveTeacher:
    """A teacher model in memory: one backbone pass a batch; its head reads only the rows that are asked for."""

    def __init__(self, model: nn.Module, vocab: int | None = None) -> None:
        self.model = model
        self.head = get_head(model, vocab)

    @torch.no_grad()
    def rows(self, batch: Batch) -> tuple[Float[Tensor, "N D"]]:
        batch = batch.for_teacher
        return (hidden_states(self.model, batch)[batch.valid],)

    @torch.no_grad()
    def logits(self, *rows: Tensor) -> Float[Tensor, "N V"]:
        (hidden,) = rows
        return self.head(hidden)

    def for_scores(self, *rows: Tensor) -> dict[str, Tensor]:
        return {"teacher_logp": self.logits(*rows).log_softmax(-1)}
