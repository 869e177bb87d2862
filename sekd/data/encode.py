"""A row of data as tokens: what the student reads, which of it is supervised, and what the teacher reads instead.

Each kind of rows has its encoder, which returns the columns of :class:`sekd.data.Sample` but its number. Where the
teacher has a context of its own (``teacher_system_prompt``, ``teacher_prompt_prefix``), it reads another prompt before
the same completion: then completions alone are supervised, since no other rows of the two correspond.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from sekd.config import SEKDConfig

Encoder = Callable[[Mapping[str, Any], PreTrainedTokenizerBase, SEKDConfig], dict[str, Any]]
ROLLOUT_COLUMNS = ("prompt_ids", "completion_ids")
"""What makes a row a rollout that was written before; its tokens are taken as they are."""


def detect_kind(first: Mapping[str, Any], args: SEKDConfig) -> str:
    """The kind of rows that the columns of the first one make, a key of :data:`ENCODERS`.

    Raises:
        ValueError: a missing column, beside those there are, or plain text that is to be prompts.
    """
    if all(column in first for column in ROLLOUT_COLUMNS):
        return "rollout"
    if args.prompt_column in first:
        if args.completion_column not in first and args.lmbda < 1:
            raise _missing(args, first, ["completion_column"])
        return "chat" if args.use_chat_template or isinstance(first[args.prompt_column], list) else "pair"
    if args.messages_column in first:
        return "messages"
    if args.text_column not in first:
        raise _missing(args, first, ["prompt_column", "messages_column", "text_column"])
    if args.text_prompt_length is not None:
        return "text_prompt"
    if args.lmbda > 0:
        raise ValueError(
            f"lmbda {args.lmbda} needs prompts, and the data is plain text (text_column {args.text_column!r}): set "
            "text_prompt_length to make the first so many tokens of each document its prompt, or lmbda: 0"
        )
    return "text"


def check_kind(kind: str, tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> None:
    """Raise ValueError for a tokenizer, or limits, or a teacher context, that rows of this kind cannot do with."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so no student could learn to stop: set tokenizer.eos_token")
    if kind == "text_prompt" and args.max_length <= (args.text_prompt_length or 0):
        raise ValueError(
            f"max_length {args.max_length} leaves no room behind a text_prompt_length of {args.text_prompt_length}; "
            "raise the first or lower the second"
        )
    if kind not in ("text", "text_prompt") and args.lmbda < 1 and args.max_length <= args.max_prompt_length:
        raise ValueError(
            f"max_length {args.max_length} leaves no room for completions behind prompts of max_prompt_length "
            f"{args.max_prompt_length}; raise the first or lower the second"
        )
    if kind in ("chat", "messages") and tokenizer.chat_template is None:
        raise ValueError(
            "the data is a conversation, but the tokenizer has no chat template: use text prompts, or set one"
        )
    if kind == "text" and args.teacher_context:
        raise ValueError(
            f"{' and '.join(args.teacher_context)} change the teacher's prompt, and plain text has none: set "
            "text_prompt_length, take data with prompts, or leave the teacher's context out"
        )
    if kind in ("pair", "text_prompt") and args.teacher_system_prompt is not None:
        remedy = ", or set use_chat_template: true" if kind == "pair" else ""
        raise ValueError(
            f"teacher_system_prompt {args.teacher_system_prompt!r} is a turn of a chat, and the prompts are text: use "
            f"teacher_prompt_prefix{remedy}"
        )


def _missing(args: SEKDConfig, first: Mapping[str, Any], fields: list[str]) -> ValueError:
    wanted = " or ".join(f"{name}: {getattr(args, name)!r}" for name in fields)
    return ValueError(
        f"the data lacks {wanted}; its columns are {', '.join(map(repr, first))}. Set the field to one of them"
    )


def _pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> dict[str, Any]:
    text = args.prompt_template.replace("{prompt}", _text(row, args.prompt_column))
    completion, teacher = [], None
    if args.completion_column in row:
        ids = tokenizer(_text(row, args.completion_column), add_special_tokens=False)["input_ids"]
        completion = [*ids, tokenizer.eos_token_id]
    if args.teacher_prompt_prefix is not None:
        teacher = tokenizer(_prefix(row, args) + text)["input_ids"]
    return _sample(tokenizer(text)["input_ids"], completion, args.supervise_prompt, teacher)


def _chat(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> dict[str, Any]:
    prompt, answer = row[args.prompt_column], row.get(args.completion_column)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": args.prompt_template.replace("{prompt}", prompt)}]
        answer = [{"role": "assistant", "content": answer}] if answer is not None else None
    return _chat_turn(_with_system(prompt, args), answer, row, tokenizer, args)


def _messages(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> dict[str, Any]:
    """Everything before the last answer is the prompt. Earlier answers are targets too, unless the template writes
    them differently once the conversation goes on (Qwen3 drops their thinking): the student never wrote those."""
    messages = _with_system(row[args.messages_column], args)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not answers:
        raise ValueError(f"messages_column {args.messages_column!r}: a conversation has no assistant turn: {messages}")
    *earlier, last = answers
    sample = _chat_turn(messages[:last], [messages[last]], row, tokenizer, args)
    ids = sample["input_ids"]
    for i in earlier if not args.teacher_context else ():
        before = _render(messages[:i], tokenizer, args, add_generation_prompt=True)
        after = _through_eos(_render(messages[: i + 1], tokenizer, args), tokenizer)
        if ids[: len(after)] == after and after[: len(before)] == before:
            sample["supervised"][len(before) : len(after)] = [1] * (len(after) - len(before))
    return sample


def _plain(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> dict[str, Any]:
    ids = [*tokenizer(_text(row, args.text_column))["input_ids"], tokenizer.eos_token_id]
    sample = {"input_ids": ids, "supervised": [1] * len(ids)}
    return sample if args.packing else {**sample, "prompt_length": 0}


def _text_prompt(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> dict[str, Any]:
    """A document's first tokens as the prompt, and its rest as the completion: none if it is not longer."""
    found, length = tokenizer(_text(row, args.text_column), return_special_tokens_mask=True), args.text_prompt_length
    prompt, completion, teacher = found["input_ids"][:length], found["input_ids"][length:], None
    if completion:
        completion = [*completion, tokenizer.eos_token_id]
    if args.lmbda == 1:  # only sample_score looks at it, and a document may be as long as a book
        completion = completion[: args.max_length - len(prompt)]
    if args.teacher_prompt_prefix is not None:
        # Joined as tokens, since the last token of the prompt may be a part of a word. The prefix begins the text now.
        words = [i for i, special in zip(prompt, found["special_tokens_mask"], strict=False) if not special]
        teacher = [*tokenizer(_prefix(row, args))["input_ids"], *words]
    return _sample(prompt, completion, args.supervise_prompt, teacher)


def _rollout(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> dict[str, Any]:
    """A rollout as it was sampled. Only what was generated is supervised, and a cut completion gets no EOS."""
    prompt, completion = (_token_ids(row, column) for column in ROLLOUT_COLUMNS)
    text, decoded = row.get("completion"), tokenizer.decode(completion)
    if isinstance(text, str) and text != decoded:
        raise ValueError(
            f"the rollouts were written with another tokenizer: the completion_ids of a row mean {decoded[:80]!r} "
            f"here, and its completion is {text[:80]!r}; train the student that wrote them (model_name_or_path), or "
            "write new ones with save_rollouts"
        )
    teacher = None
    if row.get("teacher_prompt_ids") is not None:
        teacher = _token_ids(row, "teacher_prompt_ids")
        if args.teacher_cache is not None:
            raise ValueError(
                f"teacher_cache {args.teacher_cache!r} holds the teacher's rows behind the student's prompts, and the "
                "rollouts have teacher_prompt_ids of their own; leave teacher_cache out, or drop that column"
            )
        if not teacher:
            raise ValueError("column 'teacher_prompt_ids' holds no token; drop the column, or write them again")
    elif args.teacher_context:
        raise ValueError(
            f"{' and '.join(args.teacher_context)} cannot be put before tokens, and the rollouts lack "
            "teacher_prompt_ids; leave it out, or write them in a run that has it (save_rollouts)"
        )
    sample = _sample(prompt, completion, False, teacher)
    return {**sample, "teacher_prompt_ids": teacher} if "teacher_prompt_ids" in row else sample


ENCODERS: dict[str, Encoder] = {
    "pair": _pair,
    "chat": _chat,
    "messages": _messages,
    "text": _plain,
    "text_prompt": _text_prompt,
    "rollout": _rollout,
}


def _sample(prompt: list[int], completion: list[int], supervise_prompt: bool, teacher: list[int] | None) -> dict:
    supervised = [int(supervise_prompt)] * len(prompt) + [1] * len(completion)
    sample = {"input_ids": [*prompt, *completion], "supervised": supervised, "prompt_length": len(prompt)}
    return sample if teacher is None else {**sample, "teacher_prompt_ids": teacher}


def _text(row: Mapping[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"column {column!r} holds {row[column]!r}, which is not text")
    return row[column]


def _token_ids(row: Mapping[str, Any], column: str) -> list[int]:
    ids = row[column]
    bad = [ids] if not isinstance(ids, list) else [i for i in ids if not isinstance(i, int) or i < 0 or i is True]
    if bad:
        raise ValueError(f"column {column!r} holds {bad[0]!r}, which is no token id; write the rollouts again")
    return ids


def _prefix(row: Mapping[str, Any], args: SEKDConfig) -> str:
    """``teacher_prompt_prefix`` with the row's values, in one pass: a value may itself have braces."""

    def value_of(match: re.Match) -> str:
        if match[1] not in row:
            return match[0]
        if not isinstance(row[match[1]], str | int | float):
            raise ValueError(
                f"column {match[1]!r} holds {row[match[1]]!r}, which teacher_prompt_prefix cannot show as text; "
                "drop such rows, or name another column"
            )
        return str(row[match[1]])

    return re.sub(r"\{([^{}]+)\}", value_of, str(args.teacher_prompt_prefix))


def _with_system(messages: list[dict[str, str]], args: SEKDConfig) -> list[dict[str, str]]:
    if args.system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": args.system_prompt}, *messages]


def _for_teacher(messages: list[dict[str, str]], row: Mapping[str, Any], args: SEKDConfig) -> list[dict[str, str]]:
    """The prompt as the teacher sees it: with its own system turn, and the prefix in the last user turn."""
    if args.teacher_system_prompt is not None:
        rest = messages[1:] if messages[0]["role"] == "system" else messages
        messages = [{"role": "system", "content": args.teacher_system_prompt}, *rest]
    if args.teacher_prompt_prefix is None:
        return messages
    users = [i for i, m in enumerate(messages) if m["role"] == "user" and isinstance(m["content"], str)]
    if not users:
        raise ValueError(f"teacher_prompt_prefix goes before a user's text, and a prompt has none: {messages}")
    last = messages[users[-1]]
    last = {**last, "content": _prefix(row, args) + last["content"]}
    return [*messages[: users[-1]], last, *messages[users[-1] + 1 :]]


def _chat_turn(
    prompt: list[dict[str, str]],
    answer: list[dict[str, str]] | None,
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    args: SEKDConfig,
) -> dict[str, Any]:
    prompt_ids, completion, teacher = _render(prompt, tokenizer, args, add_generation_prompt=True), [], None
    if args.teacher_context:
        teacher = _render(_for_teacher(prompt, row, args), tokenizer, args, add_generation_prompt=True)
    if answer is not None:
        ids = _render([*prompt, *answer], tokenizer, args)
        if ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError(
                "the chat template writes the prompt differently once the answer follows, so the answer's tokens "
                "cannot be told apart; use text columns, or a template whose prompt is a prefix of the conversation"
            )
        completion = _through_eos(ids[len(prompt_ids) :], tokenizer)
    return _sample(prompt_ids, completion, args.supervise_prompt, teacher)


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
