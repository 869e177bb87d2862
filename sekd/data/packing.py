"""Pack documents of plain text into sequences of one length, with little padding and few cuts."""

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

from datasets import Dataset, IterableDataset

FULL = 0.98
"""A sequence stays as it is if at least this share of it is filled."""

BLOCK = 200
"""Sequences that are filled together. The last one of a block may stay short: half a sequence on average."""


def pack_documents(
    dataset: Dataset | IterableDataset, length: int, progress: dict[str, Any]
) -> Dataset | IterableDataset:
    """Pack rows of ``input_ids`` and ``supervised`` into sequences of ``length`` tokens, in blocks of 1,000 rows.

    ``seq_lengths`` are the lengths of a sequence's documents. Best fit decreasing, as in TRL, keeps documents whole
    unless they are longer than ``length``. Where it leaves a sequence too empty, since no document fits into the rest,
    :func:`_refill` cuts documents. No token is dropped.

    ``progress`` holds arguments of ``map`` for data in memory.
    """
    from trl.data_utils import pack_dataset

    packed = pack_dataset(dataset, length, "bfd_split", progress)
    return packed.map(_refill, batched=True, batch_size=BLOCK, fn_kwargs={"length": length}, **progress)


def _refill(rows: Mapping[str, list[list[int]]], length: int) -> dict[str, list[list[int]]]:
    """Join the documents of all sequences that are not full, in order, and cut the whole into sequences again.

    A document is cut where a sequence ends; its second part begins the next one. The last sequence may stay short.
    """
    is_full = [len(ids) >= FULL * length for ids in rows["input_ids"]]
    filled = {name: [v for v, full in zip(values, is_full, strict=True) if full] for name, values in rows.items()}
    ids, supervised, lengths = (
        [item for values, full in zip(rows[name], is_full, strict=True) if not full for item in values]
        for name in ("input_ids", "supervised", "seq_lengths")
    )
    starts = range(0, len(ids), length)
    documents: list[list[int]] = [[] for _ in starts]
    for start, end in pairwise(sorted({0, *accumulate(lengths), *starts})):
        documents[start // length].append(end - start)
    filled["input_ids"] += [ids[start : start + length] for start in starts]
    filled["supervised"] += [supervised[start : start + length] for start in starts]
    filled["seq_lengths"] += documents
    return filled
