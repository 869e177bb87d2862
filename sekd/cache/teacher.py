"""A cache as the teacher, instead of a model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sekd.cache.codec import entropy_from_bytes
from sekd.cache.store import FINGERPRINT, Store
from sekd.classes import trim
from sekd.config import SEKDConfig
from sekd.fingerprints import DATED_TEMPLATE, sample_key, tokenizer_fingerprint
from sekd.models import count_classes
from sekd.scores import SCORES
from sekd.types import Batch, Positions, SparseTargets, TeacherState


class CachedTeacher:
    """RS-KD targets from an offline cache, as :class:`sekd.teachers.Teacher`.

    ``keys[sample_id]`` names a sample in the cache.

    Raises:
        ValueError: the cache lacks samples.
    """

    has_logits = False

    def __init__(self, store: Store, keys: Mapping[int, bytes]) -> None:
        missing = [i for i, key in keys.items() if key not in store]
        if missing:
            raise ValueError(
                f"teacher_cache {store.folder!r} lacks {len(missing)} of the {len(keys)} samples, for example "
                f"sample {missing[0]}; build it with this recipe's data, template, max_length and sample_fraction "
                f"({DATED_TEMPLATE})"
            )
        self.store, self.keys = store, keys

    def read(self, batch: Batch) -> TeacherState:
        """``ids`` and ``probs`` [N K] of the valid positions, and the teacher's ``entropy`` [N] if the cache has it."""
        sample_ids = batch.sample_ids.tolist()
        parts = [self.store.read(self.keys[i]) for i in sample_ids]
        for part, valid, sample_id in zip(parts, batch.valid.sum(1).tolist(), sample_ids, strict=True):
            if len(part.ids) != valid:
                raise ValueError(f"sample {sample_id} has {valid} positions, but {len(part.ids)} in the cache")
        width = max(part.ids.shape[1] for part in parts)
        ids, counts = (
            np.concatenate([np.pad(grid, ((0, 0), (0, width - grid.shape[1]))) for grid in grids])
            for grids in zip(*((part.ids, part.counts) for part in parts), strict=True)
        )
        draws, vocab = self.store.fingerprint["class_samples"], self.store.fingerprint["vocab"]
        state = {"ids": torch.from_numpy(ids), "probs": torch.from_numpy(counts).float() / draws}
        codes = [part.entropy for part in parts if part.entropy is not None]
        if codes:
            state["entropy"] = torch.from_numpy(entropy_from_bytes(np.concatenate(codes), vocab))
        return {name: tensor.to(batch.input_ids.device) for name, tensor in state.items()}

    def logits(self, state: TeacherState) -> Float[Tensor, "N V"]:
        raise ValueError("a cache holds sampled classes only; leave teacher_cache out to use the teacher itself")

    def score_inputs(self, state: TeacherState) -> dict[str, Tensor]:
        return {"teacher_entropy": state["entropy"]}

    def targets(self, positions: Positions, *_: Any) -> SparseTargets:
        """The classes that the cache was built with."""
        return trim(SparseTargets(positions.teacher["ids"], positions.teacher["probs"]))


def open_cache(tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> Store:
    """The cache of a recipe.

    Raises:
        ValueError: the cache is incomplete, damaged, or of another tokenizer, teacher or setting. The error says which.
    """
    store = Store(str(args.teacher_cache))
    built_with = store.fingerprint
    recipe = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "class_samples": args.class_samples,
        "temperature": args.kd_temperature,
        "max_length": args.max_length,
        "packing": args.packing,
    }
    for name, value in recipe.items():
        if built_with[name] != value:
            raise ValueError(
                f"teacher_cache {store.folder!r} was built with another value of {FINGERPRINT[name][1]} "
                f"({built_with[name]}, the recipe has {value}); use the recipe of the cache, or build a new one"
            )
    cached_scores = [name for name in (args.scoring.names if args.scoring else ()) if SCORES[name].in_cache]
    if cached_scores and not built_with["teacher_entropy"]:
        raise ValueError(
            f"position_score {cached_scores[0]}: teacher_cache {store.folder!r} holds no teacher entropy; build a "
            "cache with --cache_teacher_entropy true, or choose student_entropy"
        )
    teacher = (args.teacher_model_name_or_path, args.teacher_model_revision)
    cached = (built_with["teacher"]["name"], built_with["teacher"]["revision"])
    if teacher[0] is not None and teacher != cached:
        raise ValueError(
            f"teacher_cache {store.folder!r} is of teacher {cached[0]!r}, revision {cached[1]}; the recipe names "
            f"{teacher[0]!r}, revision {teacher[1]}, in teacher_model_name_or_path"
        )
    if teacher[0] is not None and args.teacher_dtype not in (None, "auto", built_with["dtype"]):
        raise ValueError(
            f"teacher_cache {store.folder!r} is of a teacher in {built_with['dtype']}; the recipe has teacher_dtype "
            f"{args.teacher_dtype}"
        )
    return store


class CacheSource:
    """The cache of a recipe, as :class:`sekd.teachers.TeacherSource`."""

    model: PreTrainedModel | None = None

    def __init__(self, args: SEKDConfig) -> None:
        self.args = args
        self.store: Store | None = None

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.store = open_cache(tokenizer, self.args)

    def load(self, attention: str | None) -> None:
        """Load nothing: samples are read when they are needed."""

    def connect(self, student: nn.Module, dataset: Dataset, packed: bool) -> tuple[CachedTeacher, int]:
        assert self.store is not None
        vocab, classes = self.store.fingerprint["vocab"], count_classes(student)
        if classes < vocab:
            raise ValueError(
                f"teacher_cache {self.store.folder!r} has {vocab} classes, but the student's head only {classes}; "
                "build it with this student as model_name_or_path"
            )
        return CachedTeacher(self.store, {row["sample_id"]: sample_key(row) for row in dataset}), vocab

    def describe(self) -> dict[str, Any]:
        assert self.store is not None
        return self.store.fingerprint
