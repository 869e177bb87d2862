"""A teacher model in memory."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sekd.classes import ClassSelection, trim
from sekd.config import SEKDConfig
from sekd.data.prepare import check_same_tokenizer
from sekd.fingerprints import weights_fingerprint
from sekd.heads import in_chunks
from sekd.models import (
    causal_lm,
    check_head,
    common_vocab,
    find_teacher_device,
    get_head,
    hidden_states,
    load_teacher,
    place_teacher,
    shard_teacher,
)
from sekd.pretrained import TEACHER, load_tokenizer
from sekd.types import Batch, DenseTargets, Positions, SparseTargets, TeacherState


class LiveTeacher:
    """A model as :class:`sekd.teachers.Teacher`: one backbone pass a batch.

    Its head runs only over the positions that are asked for. ``vocab`` is the number of classes that it shares with
    the student. The model may be on another device than the batch: hidden states and logits come to the batch's.
    """

    has_logits = True

    def __init__(self, model: nn.Module, vocab: int | None = None) -> None:
        self.model = model
        self.head = get_head(model, vocab)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return causal_lm(self.model).device

    @torch.no_grad()
    def read(self, batch: Batch) -> TeacherState:
        """``hidden`` [N D] of the valid positions."""
        own = batch.for_teacher.to(self.device)
        return {"hidden": hidden_states(self.model, own)[own.valid].to(batch.input_ids.device)}

    @torch.no_grad()
    def project(self, state: TeacherState) -> Float[Tensor, "N V"]:
        """The product of the head alone, in the teacher's dtype."""
        hidden = state["hidden"]
        return self.head.project(hidden.to(self.device)).to(hidden.device)

    def logits(self, state: TeacherState) -> Float[Tensor, "N V"]:
        return self.head.finish(self.project(state))

    def score_inputs(self, state: TeacherState) -> dict[str, Tensor]:
        return {"teacher_logp": self.logits(state).log_softmax(-1)}

    @torch.no_grad()
    def targets(
        self,
        positions: Positions,
        classes: ClassSelection,
        temperature: float,
        draw: Callable[[], Tensor],
        chunk_rows: int,
    ) -> DenseTargets | SparseTargets:
        if classes.select is None:
            return DenseTargets(positions.teacher, self.project, self.head.finish)

        def select(positions: Positions, draws: Tensor) -> tuple[Tensor, Tensor]:
            targets = classes.from_logits(self.logits(positions.teacher), draws, temperature)
            return targets.ids, targets.probs

        return trim(SparseTargets(*in_chunks(select, (positions, draw()), chunk_rows)))


class ModelSource:
    """A teacher model, given as a model or by name, as :class:`sekd.teachers.TeacherSource`."""

    def __init__(self, model: str | PreTrainedModel, args: SEKDConfig) -> None:
        self.name = model if isinstance(model, str) else None
        self.model: PreTrainedModel | None = None if isinstance(model, str) else model
        self.args, self.fingerprint = args, ""
        for field in ("teacher_load_in_4bit", "teacher_load_in_8bit"):
            if self.model is not None and getattr(args, field):
                raise ValueError(
                    f"{field} true has no effect on a teacher_model that is loaded already; pass its name, or leave "
                    f"{field} out"
                )

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.name is not None:
            own = load_tokenizer(TEACHER, self.name, self.args.teacher_model_revision)
            check_same_tokenizer(tokenizer, own)

    def load(self, attention: str | None) -> None:
        if self.name is not None:
            self.model = load_teacher(self.name, self.args, attention)

    def connect(self, student: nn.Module, dataset: Any, packed: bool) -> tuple[LiveTeacher, int]:
        assert self.model is not None
        self.fingerprint = weights_fingerprint(self.model)  # of whole weights
        if self.args.teacher_fsdp:
            shard_teacher(self.model, self.args)
        teacher = place_teacher(self.model, find_teacher_device(self.args))
        check_head(teacher, packed)
        vocab = common_vocab(student, teacher)
        return LiveTeacher(teacher, vocab), vocab

    def describe(self) -> str:
        return self.fingerprint
