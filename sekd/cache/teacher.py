"""A cache in the place of a teacher model."""

from collections.abc import Mapping

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sekd.cache.codec import entropy_from_bytes
from sekd.cache.store import FINGERPRINT, Store
from sekd.config import SEKDConfig
from sekd.fingerprints import sample_key, tokenizer_fingerprint
from sekd.types import Batch


class CachedTeacher:
    """RS-KD targets from an offline cache, in the place of a teacher model; ``keys[sample_id]`` name the samples.

    Raises:
        ValueError: samples that the cache does not hold.
    """

    def __init__(self, store: Store, keys: Mapping[int, bytes]) -> None:
        missing = [i for i, key in keys.items() if key not in store]
        if missing:
            raise ValueError(
                f"teacher_cache {store.folder!r} lacks {len(missing)} of the {len(keys)} samples, the first is sample "
                f"{missing[0]}; build it with this recipe, the same data, max_length and sample_fraction"
            )
        self.store, self.keys = store, keys

    def rows(self, batch: Batch) -> tuple[Tensor, ...]:
        """Classes and probabilities [N K] of the N valid rows, a :class:`SparseTargets`' fields; the teacher's entropy
        [N] too, if the cache has it."""
        numbers = batch.sample_ids.tolist()
        parts = [self.store.read(self.keys[i]) for i in numbers]
        for part, valid, number in zip(parts, batch.valid.sum(1).tolist(), numbers, strict=True):
            if len(part.ids) != valid:
                raise ValueError(f"sample {number} has {valid} rows, and {len(part.ids)} in the cache")
        width = max(part.ids.shape[1] for part in parts)
        ids, counts = (
            np.concatenate([np.pad(grid, ((0, 0), (0, width - grid.shape[1]))) for grid in grids])
            for grids in zip(*((part.ids, part.counts) for part in parts), strict=True)
        )
        draws, vocab = self.store.fingerprint["class_samples"], self.store.fingerprint["vocab"]
        columns = [torch.from_numpy(ids), torch.from_numpy(counts).float() / draws]
        codes = [part.entropy for part in parts if part.entropy is not None]
        if codes:
            columns.append(torch.from_numpy(entropy_from_bytes(np.concatenate(codes), vocab)))
        return tuple(column.to(batch.input_ids.device) for column in columns)

    def logits(self, *rows: Tensor) -> Float[Tensor, "N V"]:
        raise ValueError("a cache holds sampled classes only; leave teacher_cache out to use the teacher itself")

    def for_scores(self, *rows: Tensor) -> dict[str, Tensor]:
        _, _, entropy = rows
        return {"teacher_entropy": entropy}


def open_cache(tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> Store:
    """The cache of a recipe.

    Raises:
        ValueError: an incomplete or damaged cache, or one of another tokenizer, teacher or setting; it says which.
    """
    store = Store(str(args.teacher_cache))
    found = store.fingerprint
    wanted = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "class_samples": args.class_samples,
        "temperature": args.kd_temperature,
        "max_length": args.max_length,
        "packing": args.packing,
    }
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(
                f"teacher_cache {store.folder!r} was built with another value of {FINGERPRINT[name][1]} "
                f"({found[name]}, the recipe has {value}); use the recipe that it was built with, or build a new one"
            )
    if "teacher_entropy" in (args.scoring.names if args.scoring else ()) and not found["teacher_entropy"]:
        raise ValueError(
            f"position_score teacher_entropy: teacher_cache {store.folder!r} was built without it; build one with "
            "--cache_teacher_entropy true, or choose student_entropy"
        )
    ours = (args.teacher_model_name_or_path, args.teacher_model_revision)
    theirs = (found["teacher"]["name"], found["teacher"]["revision"])
    if ours[0] is not None and ours != theirs:
        raise ValueError(
            f"teacher_cache {store.folder!r} is of teacher {theirs[0]!r}, revision {theirs[1]}; the recipe names "
            f"{ours[0]!r}, revision {ours[1]}, in teacher_model_name_or_path"
        )
    if ours[0] is not None and args.teacher_dtype not in ("auto", found["dtype"]):
        raise ValueError(
            f"teacher_cache {store.folder!r} is of a teacher in {found['dtype']}; the recipe has teacher_dtype "
            f"{args.teacher_dtype}"
        )
    return store


def cached_teacher(store: Store, dataset: Dataset, classes: int) -> tuple[CachedTeacher, int]:
    """The cache as the teacher of prepared samples, and its vocabulary; ``classes`` are those of the student's head."""
    vocab = store.fingerprint["vocab"]
    if classes < vocab:
        raise ValueError(
            f"teacher_cache {store.folder!r} has {vocab} classes, and the student's head only {classes}; build it with "
            "this student as model_name_or_path"
        )
    return CachedTeacher(store, {row["sample_id"]: sample_key(row) for row in dataset}), vocab
