"""Datasets in, token batches out. The only place where targets are shifted.

Five kinds of rows are read: prompt and completion as text, or as chat messages, whole conversations (``messages``),
plain ``text``, and rollouts that were written before (``prompt_ids`` and ``completion_ids``). :mod:`sekd.rows` makes
tokens of them. Each becomes a :class:`Sample`, and samples become a batch in :func:`collate`.
"""

import glob
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset, ReadInstruction, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import get_dataset_column_names, pack_dataset

import sekd.rows
from rollouts import Rollout
from sekd.config import SEKDConfig
from sekd.rows import ENCODERS, check_kind, kind_of
from sekd.types import IGNORE

logger = logging.get_logger(__name__)
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(slots=True)
class Sample:
    """One training sequence. ``supervised`` marks the tokens that are targets; ``seq_lengths`` the packed documents.

    ``teacher_prompt_ids`` is what the teacher reads in the place of the prompt, if that is something else;
    ``entropies`` are those of the distributions that a rollout's completion was drawn from, one a token.
    """

    input_ids: list[int]
    supervised: list[int]
    sample_id: int
    prompt_length: int = 0
    seq_lengths: list[int] | None = None
    teacher_prompt_ids: list[int] | None = None
    entropies: list[float] | None = None


def is_local(name: str) -> bool:
    """Whether a dataset's name means files here, rather than a hub id."""
    return os.path.splitext(name)[1] in BUILDERS or os.path.exists(name) or name.startswith((".", "/", "~"))


def load_rows(
    name: str, config: str | None = None, split: str = "train", streaming: bool = False, field: str = "dataset_name"
) -> Dataset | IterableDataset:
    """Rows of a local json, jsonl, csv or parquet file (or folder, or glob of them), or else of a hub dataset.

    Files are one split, whatever ``split`` calls it; a slice such as ``train[:64]`` or ``train[90%:]`` selects from
    their rows. Of several files the columns that all of them have are kept. Errors name ``field``.

    Raises:
        ValueError: a file or folder that is not there or holds nothing readable.
    """
    if not is_local(name):
        return load_dataset(name, config, split=split, streaming=streaming)
    path = os.path.expanduser(name)
    pattern = os.path.join(path, "**") if os.path.isdir(path) else path
    files = sorted(f for f in glob.glob(pattern, recursive=True) if os.path.splitext(f)[1] in BUILDERS)
    if not files:
        raise ValueError(f"{field} {name!r}: no such file, or no {', '.join(BUILDERS)} file in it")
    if len({os.path.splitext(f)[1] for f in files}) > 1:
        raise ValueError(f"{field} {name!r} mixes kinds of files; name those of one kind, such as 'folder/*.jsonl'")
    if empty := [f for f in files if not os.path.getsize(f)]:
        raise ValueError(f"{field} {name!r}: {empty[0]} is empty")
    try:
        kind = BUILDERS[os.path.splitext(files[0])[1]]
        parts = [load_dataset(kind, data_files=f, split="train", streaming=streaming) for f in files]
    except DatasetsError as error:
        cause = error.__cause__ or error
        raise ValueError(f"{field} {name!r} cannot be read as {kind}: {cause}") from error
    if len(parts) > 1:
        columns = [
            c for c in get_dataset_column_names(parts[0]) if all(c in get_dataset_column_names(p) for p in parts)
        ]
        parts = [part.select_columns(columns) for part in parts]
    dataset = concatenate_datasets(parts)
    if "[" not in split:
        return dataset
    if streaming:
        raise ValueError(f"split {split!r} slices a stream, whose length is unknown; set dataset_streaming: false")
    spans = ReadInstruction.from_spec("train" + split[split.index("[") :]).to_absolute({"train": len(dataset)})
    return dataset.select(
        [i for span in spans for i in range(span.from_ or 0, len(dataset) if span.to is None else span.to)]
    )


def prepare(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, args: SEKDConfig
) -> Dataset | IterableDataset:
    """Rows as the columns of :class:`Sample`, tokenized, cut to length, packed if they are text without prompts.

    Raises:
        ValueError: an empty dataset, a missing column (lists those there are), prompts over ``max_prompt_length``.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the data is empty: the dataset and its split select no rows")
    kind = kind_of(first, args)
    check_kind(kind, tokenizer, args)
    in_memory = isinstance(dataset, Dataset)
    progress: dict[str, Any] = {"desc": "Tokenizing"} if in_memory else {}
    known = {"kind": kind, "tokenizer": tokenizer, "args": args, "code": CODE}
    dataset = dataset.map(_encode, fn_kwargs=known, remove_columns=list(first), **progress)
    if kind == "text_prompt":
        dataset = _longer_than_prompt(dataset, args)
    if kind == "text" and args.packing:
        if in_memory:
            progress = {"desc": "Packing"}
        dataset = pack_dataset(dataset, args.max_length, "bfd_split", progress)
    else:
        dataset = _within_limits(dataset, args)
    if in_memory and not len(dataset):
        raise ValueError("no sample has a token to learn from; raise max_length, or look at the completions")
    return dataset.map(_number, with_indices=True)


def collate(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Tensor]:
    """The fields of :class:`sekd.types.Batch`, padded on the right; the teacher's own where a sample has a prompt for
    it, with as many targets in the same order."""
    batch = _padded(samples, pad_token_id)
    if any(sample.teacher_prompt_ids is not None for sample in samples):
        theirs = _padded([*map(_as_the_teacher_reads, samples)], pad_token_id)
        batch |= {f"teacher_{name}": grid for name, grid in theirs.items()}
    if all(sample.entropies is not None for sample in samples):
        entropy = torch.zeros(batch["targets"].shape)
        for row, sample in zip(entropy, samples, strict=True):
            row[sample.prompt_length : len(sample.input_ids)] = torch.tensor(sample.entropies)
        batch["student_entropy"] = entropy.roll(-1, dims=1)  # a token was drawn from the row before it
    return {**batch, "sample_ids": torch.tensor([s.sample_id for s in samples])}


def _padded(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Tensor]:
    """Row t gets token t + 1 as its target where that token is supervised and does not begin a document."""
    width = max(len(s.input_ids) for s in samples)
    input_ids = torch.full((len(samples), width), pad_token_id)
    supervised = torch.zeros(len(samples), width, dtype=torch.bool)
    position_ids = torch.empty(len(samples), width, dtype=torch.long)
    for b, sample in enumerate(samples):
        length = len(sample.input_ids)
        input_ids[b, :length] = torch.tensor(sample.input_ids)
        supervised[b, :length] = torch.tensor(sample.supervised, dtype=torch.bool)
        *lengths, last = sample.seq_lengths or [length]
        # Padding continues the last document: what comes later is never attended to, and needs no mask.
        position_ids[b] = torch.cat([torch.arange(n) for n in (*lengths, last + width - length)])
    targets = torch.full_like(input_ids, IGNORE)
    is_target = supervised[:, 1:] & (position_ids[:, 1:] > 0)
    targets[:, :-1] = torch.where(is_target, input_ids[:, 1:], IGNORE)
    return {"input_ids": input_ids, "targets": targets, "position_ids": position_ids}


def _as_the_teacher_reads(sample: Sample) -> Sample:
    """The same completion behind the teacher's prompt."""
    prompt, behind = sample.teacher_prompt_ids, sample.prompt_length
    if prompt is None:
        return sample
    supervised = [0, *sample.supervised[1:]]  # without a prompt, the student has no row for its first token
    return replace(
        sample,
        input_ids=[*prompt, *sample.input_ids[behind:]],
        supervised=[0] * len(prompt) + supervised[behind:],
        prompt_length=len(prompt),
    )


def from_rollout(sample: Sample, rollout: Rollout, entropies: list[float] | None = None) -> Sample:
    """The sample with a generated completion in the place of its own; only what was generated is supervised."""
    ids = [*rollout.prompt_ids, *rollout.completion_ids]
    supervised = [0] * len(rollout.prompt_ids) + [1] * len(rollout.completion_ids)
    theirs = sample.teacher_prompt_ids
    length = len(rollout.prompt_ids)
    return Sample(ids, supervised, sample.sample_id, length, teacher_prompt_ids=theirs, entropies=entropies)


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless every token means the same to both."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    different = [t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)]
    if different:
        token = min(different)
        raise ValueError(
            f"teacher and student have different tokenizers: {len(different)} tokens differ, for example {token!r} "
            f"(student {ours.get(token)}, teacher {theirs.get(token)}); choose models of one family"
        )


def _longer_than_prompt(dataset: Dataset | IterableDataset, args: SEKDConfig) -> Dataset | IterableDataset:
    """The documents of which something is left behind their prompt."""
    limit = args.text_prompt_length
    what = f"documents that are not longer than text_prompt_length {limit}"
    kept = _keep(dataset, ["input_ids", "prompt_length"], _is_longer, what)
    if isinstance(kept, Dataset) and not len(kept):
        longest = max(dataset["prompt_length"])
        raise ValueError(
            f"text_prompt_length {limit}: no document is longer; the longest has {longest} tokens, so lower it"
        )
    return kept


def _within_limits(dataset: Dataset | IterableDataset, args: SEKDConfig) -> Dataset | IterableDataset:
    """Over-long prompts are an error or dropped; sequences are cut to ``max_length``; what is lost is counted."""
    in_memory, limit = isinstance(dataset, Dataset), args.max_prompt_length
    if in_memory and args.overlong_prompts == "error":
        longer = [length for length in dataset["prompt_length"] if length > limit]
        if longer:
            raise ValueError(_overlong(f"{len(longer)} of {len(dataset)} prompts are", max(longer), args))
    dataset = _keep(dataset, ["prompt_length"], partial(_fits, args=args), f"prompts over max_prompt_length {limit}")
    if args.lmbda > 0:
        dataset = _keep(dataset, ["prompt_length"], bool, "prompts without a token")
    if args.lmbda == 1:  # rollouts bring their own completions
        return dataset
    if in_memory:
        lengths = [len(ids) for ids in dataset["input_ids"]]
        if cut_short := sum(length > args.max_length for length in lengths):
            logger.warning(f"cut {cut_short} of {len(lengths)} sequences to max_length {args.max_length}")
    dataset = dataset.map(_cut, fn_kwargs={"length": args.max_length})
    if args.lmbda > 0:
        return dataset
    return _keep(dataset, ["supervised"], _teaches, "samples that have no token to learn from")


# Functions of the module, not closures: datasets hashes what it maps, and of these the name and arguments alone. That
# it takes nothing from its cache which other code has made, the first one gets this code as an argument.
CODE = hashlib.sha256(Path(sekd.rows.__file__).read_bytes() + Path(__file__).read_bytes()).hexdigest()


def _encode(
    row: Mapping[str, Any], kind: str, tokenizer: PreTrainedTokenizerBase, args: SEKDConfig, code: str
) -> dict[str, Any]:
    return ENCODERS[kind](row, tokenizer, args)


def _is_longer(input_ids: list[int], prompt_length: int) -> bool:
    return len(input_ids) > prompt_length


def _fits(prompt_length: int, args: SEKDConfig) -> bool:
    if prompt_length > args.max_prompt_length and args.overlong_prompts == "error":
        raise ValueError(_overlong("a prompt of the stream is", prompt_length, args))
    return prompt_length <= args.max_prompt_length


def _cut(row: Mapping[str, Any], length: int) -> dict[str, Any]:
    return {name: row[name][:length] for name in ("input_ids", "supervised")}


def _teaches(supervised: list[int]) -> bool:
    return any(supervised[1:])


def _number(_: Mapping[str, Any], index: int) -> dict[str, int]:
    return {"sample_id": index}


def _keep(
    dataset: Dataset | IterableDataset, columns: list[str], wanted: Callable[..., bool], what: str
) -> Dataset | IterableDataset:
    """The rows whose columns are wanted. How many others there are is logged, of a stream as it goes on."""
    if isinstance(dataset, Dataset):
        kept = dataset.filter(wanted, input_columns=columns)
        if len(kept) < len(dataset):
            logger.warning(f"dropped {len(dataset) - len(kept)} of {len(dataset)} {what}")
        return kept
    dropped = 0

    def wanted_of_stream(*values: Any) -> bool:
        nonlocal dropped
        is_wanted = wanted(*values)
        dropped += not is_wanted
        if not is_wanted and dropped in (1, 10, 100, 1000, 10_000, 100_000):
            logger.warning(f"dropped {dropped} {what} so far")
        return is_wanted

    return dataset.filter(wanted_of_stream, input_columns=columns)


def _overlong(who: str, longest: int, args: SEKDConfig) -> str:
    return (
        f"{who} longer than max_prompt_length {args.max_prompt_length}; raise it to {longest}, "
        "or drop them with overlong_prompts: drop"
    )
