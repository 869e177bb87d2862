"""Prepare a dataset for training: encode its rows, apply the limits on length, pack plain text, number the samples.

The result is again a dataset or a stream. Its rows hold the fields of :class:`sekd.data.Sample`. Every row that is
dropped, and every sequence that is cut, is counted in the log.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from sekd.config import SEKDConfig
from sekd.data import encode, packing
from sekd.data.encode import ENCODERS, EncodeOptions, describe_turn_end, has_empty_answer, set_eos
from sekd.data.kinds import check_kind, detect_kind
from sekd.data.packing import pack_documents

logger = logging.get_logger(__name__)


def prepare(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, args: SEKDConfig
) -> Dataset | IterableDataset:
    """Turn rows into samples: tokenized, cut to length, and packed if they are text without prompts.

    The columns of the result are the fields of :class:`sekd.data.Sample`; ``sample_id`` counts from 0.
    ``args.eos``, if it is set, becomes the tokenizer's EOS token.

    Raises:
        ValueError: an empty dataset, a missing column, a row that cannot be encoded, a prompt over
            ``max_prompt_length``, completions that are all empty, or no sample with a token to learn from.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the data is empty: the dataset and its split select no rows")
    set_eos(tokenizer, args)
    kind = detect_kind(first, args)
    check_kind(kind, tokenizer, args)
    options = EncodeOptions.from_config(args, kind)
    if warning := describe_turn_end(first, kind, tokenizer, options):
        logger.warning_once(warning)
    in_memory = isinstance(dataset, Dataset)
    progress: dict[str, Any] = {"desc": "Tokenizing", "num_proc": args.dataset_num_proc} if in_memory else {}
    arguments = {"kind": kind, "tokenizer": tokenizer, "options": options, "code": CODE}
    dataset = dataset.map(_encode_row, fn_kwargs=arguments, remove_columns=list(first), **progress)
    dataset = _check_answers(dataset, args)
    if kind == "text_prompt":
        dataset = _drop_short_documents(dataset, args)
    if kind == "text" and args.packing:
        dataset = pack_documents(dataset, args.max_length, {"desc": "Packing"} if in_memory else {})
        description = "packed sequences that have no token to learn from"
        dataset = _filter_rows(dataset, ["seq_lengths"], _has_long_document, description)
    else:
        dataset = _apply_limits(dataset, args)
    if in_memory and not len(dataset):
        raise ValueError("no sample has a token to learn from; raise max_length, or check the completions")
    return dataset.map(_number_sample, with_indices=True)


def is_packed(dataset: Dataset | IterableDataset) -> bool:
    """Whether prepared samples hold several documents each.

    Raises:
        ValueError: there is no sample.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("no sample is left of the data; check max_prompt_length, max_length and the completions")
    return "seq_lengths" in first


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Check that both tokenizers have the same tokens with the same ids.

    Raises:
        ValueError: a token differs; the error names an example.
    """
    student_ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    different = [t for t in student_ids.keys() | teacher_ids.keys() if student_ids.get(t) != teacher_ids.get(t)]
    if different:
        token = min(different)
        raise ValueError(
            f"teacher and student have different tokenizers: {len(different)} tokens differ, for example {token!r} "
            f"(student {student_ids.get(token)}, teacher {teacher_ids.get(token)}); choose models of one family"
        )


def check_token_ids(dataset: Dataset | IterableDataset, classes: int) -> None:
    """Check that student and teacher have the tokens of prepared samples in memory. ``classes`` is what both have.

    A recorded rollout may have ids that the tokenizer lacks, since a model may have more classes.

    Raises:
        ValueError: a token id is not below ``classes``.
    """
    if isinstance(dataset, IterableDataset):
        return
    columns = [name for name in ("input_ids", "teacher_prompt_ids") if name in dataset.features]
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            largest = pc.max(pc.list_flatten(table[name])).as_py() if pc.any(pc.is_valid(table[name])).as_py() else None
            if largest is not None and largest >= classes:
                raise ValueError(
                    f"the data has token id {largest}, and student and teacher have {classes} classes in common; "
                    "choose models of one family, or generate the rollouts again with this teacher"
                )


def _check_answers(dataset: Dataset | IterableDataset, args: SEKDConfig) -> Dataset | IterableDataset:
    """Refuse data whose completions are all empty, and count empty ones. A stream is not checked."""
    if isinstance(dataset, Dataset) and not args.all_on_policy:
        empty = sum(dataset["is_empty"])
        if empty and empty == len(dataset):
            raise ValueError(
                f"all {empty} completions are empty, so the student would learn to say nothing; set completion_column "
                "(or messages_column) to the column of the answers"
            )
        if empty:
            logger.warning(f"{empty} of {len(dataset)} completions are empty: the student learns to say nothing there")
    return dataset.remove_columns("is_empty")


def _drop_short_documents(dataset: Dataset | IterableDataset, args: SEKDConfig) -> Dataset | IterableDataset:
    """Drop the documents that have no token after their prompt."""
    limit = args.text_prompt_length
    description = f"documents that are not longer than text_prompt_length {limit}"
    kept = _filter_rows(dataset, ["input_ids", "prompt_length"], _has_completion, description)
    if isinstance(kept, Dataset) and not len(kept):
        longest = max(dataset["prompt_length"])
        raise ValueError(
            f"text_prompt_length {limit}: no document is longer; the longest has {longest} tokens, so lower it"
        )
    return kept


def _apply_limits(dataset: Dataset | IterableDataset, args: SEKDConfig) -> Dataset | IterableDataset:
    """Reject or drop overlong prompts, cut sequences to ``max_length``, and drop samples without a target."""
    in_memory, limit = isinstance(dataset, Dataset), args.max_prompt_length
    refuses = args.overlong_prompts == "error"
    if in_memory and refuses:
        overlong = [length for length in dataset["prompt_length"] if length > limit]
        if overlong:
            prompts = f"{len(overlong)} of {len(dataset)} prompts are"
            raise ValueError(_describe_overlong(prompts, max(overlong), limit))
    description = f"prompts over max_prompt_length {limit}"
    dataset = _filter_rows(dataset, ["prompt_length"], partial(_fits_limit, limit=limit, refuses=refuses), description)
    if args.any_on_policy:
        dataset = _filter_rows(dataset, ["prompt_length"], bool, "prompts without a token")
    if args.all_on_policy:  # each completion will be generated
        return dataset
    if in_memory:
        lengths = [len(ids) for ids in dataset["input_ids"]]
        if cut_short := sum(length > args.max_length for length in lengths):
            logger.warning(f"cut {cut_short} of {len(lengths)} sequences to max_length {args.max_length}")
    dataset = dataset.map(_cut_row, fn_kwargs={"length": args.max_length})
    if args.any_on_policy:
        return dataset
    return _filter_rows(dataset, ["supervised"], _has_target, "samples that have no token to learn from")


# Module-level functions, not closures: `datasets` builds its cache key from a function's name and arguments only. So
# they take only the values that they read, not the whole configuration: another learning rate needs no other tokens.
# Passing CODE (a hash of this source) makes `datasets` encode again when the code changes.
SOURCES = (encode.__file__, packing.__file__, __file__)
CODE = hashlib.sha256(b"".join(Path(str(file)).read_bytes() for file in SOURCES)).hexdigest()


def _encode_row(
    row: Mapping[str, Any], kind: str, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions, code: str
) -> dict[str, Any]:
    return {**ENCODERS[kind](row, tokenizer, options), "is_empty": has_empty_answer(row, kind, options)}


def _has_completion(input_ids: list[int], prompt_length: int) -> bool:
    return len(input_ids) > prompt_length


def _fits_limit(prompt_length: int, limit: int, refuses: bool) -> bool:
    if prompt_length > limit and refuses:
        raise ValueError(_describe_overlong("a prompt of the stream is", prompt_length, limit))
    return prompt_length <= limit


def _cut_row(row: Mapping[str, Any], length: int) -> dict[str, Any]:
    return {name: row[name][:length] for name in ("input_ids", "supervised")}


def _has_target(supervised: list[int]) -> bool:
    return any(supervised[1:])


def _has_long_document(seq_lengths: list[int]) -> bool:
    return max(seq_lengths) > 1


def _number_sample(_: Mapping[str, Any], index: int) -> dict[str, int]:
    return {"sample_id": index}


def _filter_rows(
    dataset: Dataset | IterableDataset, columns: list[str], is_kept: Callable[..., bool], description: str
) -> Dataset | IterableDataset:
    """Keep the rows for which ``is_kept`` is true of their columns, and log how many are dropped.

    ``description`` says what the dropped rows are. The rows of a stream are counted while they are read.
    """
    if isinstance(dataset, Dataset):
        kept = dataset.filter(is_kept, input_columns=columns)
        if len(kept) < len(dataset):
            logger.warning(f"dropped {len(dataset) - len(kept)} of {len(dataset)} {description}")
        return kept
    dropped = 0

    def is_kept_counted(*values: Any) -> bool:
        nonlocal dropped
        keeps = is_kept(*values)
        dropped += not keeps
        if not keeps and dropped in (1, 10, 100, 1000, 10_000, 100_000):
            logger.warning(f"dropped {dropped} {description} so far")
        return keeps

    return dataset.filter(is_kept_counted, input_columns=columns)


def _describe_overlong(prompts: str, longest: int, limit: int) -> str:
    return (
        f"{prompts} longer than max_prompt_length {limit}; raise it to {longest}, "
        "or drop them with overlong_prompts: drop"
    )
