"""Datasets in, token batches out. The only place where targets are shifted.

Three kinds of rows are read: prompt and completion (text or chat messages), whole conversations (``messages``), and
plain ``text``. Each becomes a :class:`Sample`, and samples become a batch in :func:`collate`.
"""

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset, ReadInstruction, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import get_dataset_column_names, pack_dataset

from rollouts import Rollout
from sekd.config import SEKDConfig
from sekd.types import IGNORE

logger = logging.get_logger(__name__)
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(slots=True)
class Sample:
    """One training sequence. ``supervised`` marks the tokens that are targets; ``seq_lengths`` the packed documents."""

    input_ids: list[int]
    supervised: list[int]
    sample_id: int
    prompt_length: int = 0
    seq_lengths: list[int] | None = None


def is_local(name: str) -> bool:
    """Whether a dataset's name means files here, rather than a hub id."""
    return os.path.splitext(name)[1] in BUILDERS or os.path.exists(name) or name.startswith((".", "/", "~"))


def load_rows(
    name: str, config: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """Rows of a local json, jsonl, csv or parquet file (or folder, or glob of them), or else of a hub dataset.

    Files are one split, whatever ``split`` calls it; a slice such as ``train[:64]`` or ``train[90%:]`` selects from
    their rows. Of several files the columns that all of them have are kept.

    Raises:
        ValueError: a file or folder that is not there or holds nothing readable.
    """
    if not is_local(name):
        return load_dataset(name, config, split=split, streaming=streaming)
    path = os.path.expanduser(name)
    pattern = os.path.join(path, "**") if os.path.isdir(path) else path
    files = sorted(f for f in glob.glob(pattern, recursive=True) if os.path.splitext(f)[1] in BUILDERS)
    if not files:
        raise ValueError(f"dataset_name {name!r}: no such file, or no {', '.join(BUILDERS)} file in it")
    if len({os.path.splitext(f)[1] for f in files}) > 1:
        raise ValueError(
            f"dataset_name {name!r} mixes kinds of files; name those of one kind, such as 'folder/*.jsonl'"
        )
    if empty := [f for f in files if not os.path.getsize(f)]:
        raise ValueError(f"dataset_name {name!r}: {empty[0]} is empty")
    try:
        kind = BUILDERS[os.path.splitext(files[0])[1]]
        parts = [load_dataset(kind, data_files=f, split="train", streaming=streaming) for f in files]
    except DatasetsError as error:
        cause = error.__cause__ or error
        raise ValueError(f"dataset_name {name!r} cannot be read as {kind}: {cause}") from error
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
    """Rows as the columns of :class:`Sample`, tokenized, cut to length, packed if they are text.

    Raises:
        ValueError: an empty dataset, a missing column (lists those there are), prompts over ``max_prompt_length``.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the data is empty: the dataset and its split select no rows")
    encode, is_text = _encoder(first, tokenizer, args)
    in_memory = isinstance(dataset, Dataset)
    progress: dict[str, Any] = {"desc": "Tokenizing"} if in_memory else {}
    dataset = dataset.map(encode, remove_columns=list(first), **progress)
    if is_text and args.packing:
        if in_memory:
            progress = {"desc": "Packing"}
        dataset = pack_dataset(dataset, args.max_length, "bfd_split", progress)
    else:
        dataset = _within_limits(dataset, args)
    if in_memory and not len(dataset):
        raise ValueError("no sample has a token to learn from; raise max_length, or look at the completions")
    return dataset.map(lambda _, index: {"sample_id": index}, with_indices=True)


def collate(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Tensor]:
    """The fields of :class:`sekd.types.Batch`, padded on the right.

    Row t gets token t + 1 as its target where that token is supervised and does not begin a document.
    """
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
    sample_ids = torch.tensor([s.sample_id for s in samples])
    return {"input_ids": input_ids, "targets": targets, "position_ids": position_ids, "sample_ids": sample_ids}


def from_rollout(sample: Sample, rollout: Rollout) -> Sample:
    """The sample with a generated completion in the place of its own; only what was generated is supervised."""
    ids = [*rollout.prompt_ids, *rollout.completion_ids]
    supervised = [0] * len(rollout.prompt_ids) + [1] * len(rollout.completion_ids)
    return Sample(ids, supervised, sample.sample_id, len(rollout.prompt_ids))


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


Encoder = Callable[[Mapping[str, Any]], dict[str, Any]]


def _encoder(first: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> tuple[Encoder, bool]:
    """The function that tokenizes a row of this kind, and whether it is plain text."""
    if args.prompt_column in first:
        if args.completion_column not in first and args.lmbda < 1:
            raise _missing(args, first, ["completion_column"])
        is_chat = args.use_chat_template or isinstance(first[args.prompt_column], list)
        encode = _encode_chat_pair if is_chat else _encode_pair
    elif args.messages_column in first:
        encode = _encode_messages
    elif args.text_column in first and args.lmbda == 0:
        encode = _encode_text
    else:
        raise _missing(args, first, ["prompt_column", "messages_column"] + ["text_column"] * (args.lmbda == 0))
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so no student could learn to stop: set tokenizer.eos_token")
    if encode is not _encode_text and args.lmbda < 1 and args.max_length <= args.max_prompt_length:
        raise ValueError(
            f"max_length {args.max_length} leaves no room for completions behind prompts of max_prompt_length "
            f"{args.max_prompt_length}; raise the first or lower the second"
        )
    if encode is not _encode_pair and encode is not _encode_text and tokenizer.chat_template is None:
        raise ValueError(
            "the data is a conversation, but the tokenizer has no chat template: use text prompts, or set one"
        )
    return lambda row: encode(row, tokenizer, args), encode is _encode_text


def _missing(args: SEKDConfig, first: Mapping[str, Any], fields: list[str]) -> ValueError:
    wanted = " or ".join(f"{name}: {getattr(args, name)!r}" for name in fields)
    return ValueError(
        f"the data lacks {wanted}; its columns are {', '.join(map(repr, first))}. Set the field to one of them"
    )


def _encode_pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> dict[str, Any]:
    for column in (args.prompt_column, args.completion_column):
        if not isinstance(row.get(column, ""), str):
            raise ValueError(f"column {column!r} holds {row[column]!r}, which is not text")
    prompt = tokenizer(args.prompt_template.replace("{prompt}", row[args.prompt_column]))["input_ids"]
    completion: list[int] = []
    if args.completion_column in row:
        completion = tokenizer(row[args.completion_column], add_special_tokens=False)["input_ids"]
        completion = [*completion, tokenizer.eos_token_id]
    return _pair(prompt, completion, args)


def _encode_chat_pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> dict[str, Any]:
    prompt, answer = row[args.prompt_column], row.get(args.completion_column)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": args.prompt_template.replace("{prompt}", prompt)}]
        answer = [{"role": "assistant", "content": answer}] if answer is not None else None
    return _chat_turn(_with_system(prompt, args), answer, tokenizer, args)


def _encode_messages(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> dict[str, Any]:
    """Everything before the last answer is the prompt. Earlier answers are targets too, unless the template writes
    them differently once the conversation goes on (Qwen3 drops their thinking): the student never wrote those."""
    messages = _with_system(row[args.messages_column], args)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not answers:
        raise ValueError(f"messages_column {args.messages_column!r}: a conversation has no assistant turn: {messages}")
    *earlier, last = answers
    sample = _chat_turn(messages[:last], [messages[last]], tokenizer, args)
    ids = sample["input_ids"]
    for i in earlier:
        before = _render(messages[:i], tokenizer, args, add_generation_prompt=True)
        after = _through_eos(_render(messages[: i + 1], tokenizer, args), tokenizer)
        if ids[: len(after)] == after and after[: len(before)] == before:
            sample["supervised"][len(before) : len(after)] = [1] * (len(after) - len(before))
    return sample


def _encode_text(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> dict[str, Any]:
    ids = [*tokenizer(row[args.text_column])["input_ids"], tokenizer.eos_token_id]
    sample = {"input_ids": ids, "supervised": [1] * len(ids)}
    return sample if args.packing else {**sample, "prompt_length": 0}


def _with_system(messages: list[dict[str, str]], args: SEKDConfig) -> list[dict[str, str]]:
    if args.system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": args.system_prompt}, *messages]


def _chat_turn(
    prompt: list[dict[str, str]],
    answer: list[dict[str, str]] | None,
    tokenizer: PreTrainedTokenizerBase,
    args: SEKDConfig,
) -> dict[str, Any]:
    prompt_ids = _render(prompt, tokenizer, args, add_generation_prompt=True)
    if answer is None:
        return _pair(prompt_ids, [], args)
    ids = _render([*prompt, *answer], tokenizer, args)
    if ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError(
            "the chat template writes the prompt differently once the answer follows, so the answer's tokens cannot "
            "be told apart; use text columns, or a template whose prompt is a prefix of the conversation"
        )
    return _pair(prompt_ids, _through_eos(ids[len(prompt_ids) :], tokenizer), args)


def _render(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, args: SEKDConfig, **options: bool
) -> list[int]:
    variables: Any = args.chat_template_kwargs or {}  # a dict: TrainingArguments parses text
    return tokenizer.apply_chat_template(messages, return_dict=False, **options, **variables)


def _through_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Without what a template writes after the last EOS, since that is never generated."""
    if tokenizer.eos_token_id not in ids:
        return ids
    return ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]


def _pair(prompt: list[int], completion: list[int], args: SEKDConfig) -> dict[str, Any]:
    supervised = [int(args.supervise_prompt)] * len(prompt) + [1] * len(completion)
    return {"input_ids": [*prompt, *completion], "supervised": supervised, "prompt_length": len(prompt)}


def _within_limits(dataset: Dataset | IterableDataset, args: SEKDConfig) -> Dataset | IterableDataset:
    """Over-long prompts are an error or dropped; sequences are cut to ``max_length``; what is lost is counted."""
    in_memory, limit, dropped = isinstance(dataset, Dataset), args.max_prompt_length, 0

    def fits(row: Mapping[str, Any]) -> bool:
        nonlocal dropped
        length = row["prompt_length"]
        if length <= limit:
            return True
        if args.overlong_prompts == "error":
            raise ValueError(_overlong("a prompt of the stream is", length, args))
        dropped += 1
        if not in_memory and dropped in (1, 10, 100, 1000, 10_000, 100_000):
            logger.warning(f"dropped {dropped} prompts over max_prompt_length {limit} so far")
        return False

    if in_memory:
        longer = [length for length in dataset["prompt_length"] if length > limit]
        if longer and args.overlong_prompts == "error":
            raise ValueError(_overlong(f"{len(longer)} of {len(dataset)} prompts are", max(longer), args))
        if longer:
            logger.warning(f"dropped {len(longer)} of {len(dataset)} prompts over max_prompt_length {limit}")
    dataset = dataset.filter(fits)
    if args.lmbda == 1:  # rollouts bring their own completions
        return dataset
    if in_memory:
        lengths = [len(ids) for ids in dataset["input_ids"]]
        if cut_short := sum(length > args.max_length for length in lengths):
            logger.warning(f"cut {cut_short} of {len(lengths)} sequences to max_length {args.max_length}")

    def cut(row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: row[name][: args.max_length] for name in ("input_ids", "supervised")}

    cut_rows = dataset.map(cut)
    kept = cut_rows.filter(lambda row: any(row["supervised"][1:]) or args.lmbda > 0)
    if in_memory and len(kept) < len(dataset):
        logger.warning(f"dropped {len(dataset) - len(kept)} of {len(dataset)} samples that have no token to learn from")
    return kept


def _overlong(who: str, longest: int, args: SEKDConfig) -> str:
    return (
        f"{who} longer than max_prompt_length {args.max_prompt_length}; raise it to {longest}, "
        "or drop them with overlong_prompts: drop"
    )
