"""Datasets in, token batches out. The only place where targets are shifted.

Five kinds of rows are read: prompt and completion as text, or as chat messages, whole conversations (``messages``),
plain ``text``, and rollouts that were written before (``prompt_ids`` and ``completion_ids``).
:mod:`sekd.data.encode` makes tokens of them. Each becomes a :class:`Sample`; :func:`collate` joins them.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import pack_dataset

from sekd.config import SEKDConfig
from sekd.data import encode
from sekd.data.encode import ENCODERS, check_kind, detect_kind

logger = logging.get_logger(__name__)


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
    kind = detect_kind(first, args)
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
CODE = hashlib.sha256(Path(str(encode.__file__)).read_bytes() + Path(__file__).read_bytes()).hexdigest()


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
