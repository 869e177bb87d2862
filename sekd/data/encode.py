"""Encode a row of a dataset as tokens: the student's sequence, its supervised tokens, and the teacher's prompt.

There are six kinds of rows: prompt and completion as text (``pair``) or as chat messages (``chat``), conversations
(``messages``), plain ``text``, plain text whose first tokens are a prompt (``text_prompt``), and rollouts that were
generated before (``rollout``). Each kind has an encoder, which returns the fields of :class:`sekd.data.Sample` except
``sample_id``.

With a context of its own (``teacher_system_prompt``, ``teacher_prompt_prefix``), the teacher reads another prompt
before the same completion. Then only completions are supervised, since both models read no other tokens in common.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedTokenizerBase

from sekd.config import SEKDConfig
from sekd.data.kinds import ROLLOUT_COLUMNS


@dataclass(frozen=True)
class EncodeOptions:
    """The fields of SEKDConfig that the encoding reads. Tokens are cached by them, and by no other field."""

    prompt_column: str
    completion_column: str
    messages_column: str
    text_column: str
    prompt_template: str
    chat_template_kwargs: Mapping[str, Any] | None
    system_prompt: str | None
    teacher_system_prompt: str | None
    teacher_prompt_prefix: str | None
    teacher_context: list[str]
    text_prompt_length: int | None
    supervise_prompt: bool
    packing: bool
    teacher_cache: str | None
    """None unless the rows are rollouts, which alone read it."""
    longest_document: int | None
    """Tokens of a document that are kept, if its first tokens are a prompt; None keeps all."""

    @classmethod
    def from_config(cls, args: SEKDConfig, kind: str) -> "EncodeOptions":
        """The options for rows of a kind."""
        # On-policy, only sample_score reads the rest of a document, which may be as long as a book.
        keeps_all = kind != "text_prompt" or not args.all_on_policy
        special: dict[str, Any] = {
            "teacher_cache": args.teacher_cache if kind == "rollout" else None,
            "longest_document": None if keeps_all else args.max_length,
        }
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls) if f.name not in special}, **special)


Encoder = Callable[[Mapping[str, Any], PreTrainedTokenizerBase, EncodeOptions], dict[str, Any]]
ROLES = {"human": "user", "gpt": "assistant"}
"""The role of a chat template for each role of ShareGPT."""


def set_eos(tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> None:
    """Set the tokenizer's EOS token to ``args.eos``, if that is set.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    if args.eos is None:
        return
    if args.eos not in tokenizer.get_vocab():
        raise ValueError(f"eos {args.eos!r} is not a token of the student's tokenizer; name one that is")
    tokenizer.eos_token = args.eos


def describe_turn_end(
    first: Mapping[str, Any], kind: str, tokenizer: PreTrainedTokenizerBase, args: EncodeOptions
) -> str | None:
    """A warning if the chat template ends answers with another token than EOS, so that no target is EOS; or None.

    The answer of the first row decides, or an answer that is made up if the row has none.
    """
    if kind not in ("chat", "messages"):
        return None
    if kind == "chat" and first.get(args.completion_column) is None:
        prompt, _ = _read_chat(first, args)
        if prompt[-1]["role"] == "assistant":
            return None
        # The answer need not begin with the prompt for generation: some templates begin it with a thinking part.
        conversation = _render([*prompt, {"role": "assistant", "content": "1"}], tokenizer, args)
        ids = conversation[len(_render(prompt, tokenizer, args)) :]
    else:
        sample = ENCODERS[kind](first, tokenizer, args)
        ids = sample["input_ids"][sample["prompt_length"] :]
    if tokenizer.eos_token_id in ids:
        return None
    special = tokenizer.added_tokens_decoder
    ends = [str(special[i]) for i in ids if i in special]
    if not ends:
        return (
            f"the chat template ends answers neither with the EOS token {tokenizer.eos_token!r} nor with another "
            "special token, so the student does not learn to stop; use a template that ends answers with EOS"
        )
    return (
        f"the chat template ends answers with {ends[-1]!r}, but the tokenizer's EOS token is {tokenizer.eos_token!r}, "
        "so EOS is never a target, and text is supervised that the template writes after the end. Set eos: "
        f"{ends[-1]!r}, which also ends rollouts there"
    )


def has_empty_answer(row: Mapping[str, Any], kind: str, args: EncodeOptions) -> bool:
    """Whether the completion (or the last answer of the conversation) has no text, so that only its end is learned."""
    if kind == "messages":
        turns = [m for m in _get_messages(row, args.messages_column) if m["role"] == "assistant"][-1:]
    elif kind in ("pair", "chat"):
        answer = row.get(args.completion_column)
        turns = answer if isinstance(answer, list) else [{"content": answer}]
    else:
        return False
    contents = [turn.get("content") or turn.get("tool_calls") for turn in turns]
    return not any(content.strip() if isinstance(content, str) else content for content in contents)


def _encode_pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: EncodeOptions) -> dict[str, Any]:
    text = args.prompt_template.replace("{prompt}", _get_text(row, args.prompt_column))
    completion, teacher = [], None
    if args.completion_column in row:
        ids = tokenizer(_get_text(row, args.completion_column), add_special_tokens=False)["input_ids"]
        completion = [*ids, tokenizer.eos_token_id]
    if args.teacher_prompt_prefix is not None:
        teacher, _ = _tokenize(_format_prefix(row, args) + text, tokenizer)
    prompt, _ = _tokenize(text, tokenizer)
    return _make_sample(prompt, completion, args.supervise_prompt, teacher)


def _encode_chat(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: EncodeOptions) -> dict[str, Any]:
    prompt, answer = _read_chat(row, args)
    return _encode_turn(prompt, answer, row, tokenizer, args)


def _read_chat(row: Mapping[str, Any], args: EncodeOptions) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The messages of the prompt and of the answer, if there is an answer."""
    prompt, answer = row[args.prompt_column], row.get(args.completion_column)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": args.prompt_template.replace("{prompt}", prompt)}]
        answer = [{"role": "assistant", "content": answer}] if answer is not None else None
    else:
        prompt = _get_messages(row, args.prompt_column)
        answer = _get_messages(row, args.completion_column) if answer is not None else None
    return _add_system_turn(prompt, args), answer


def _encode_messages(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: EncodeOptions) -> dict[str, Any]:
    """Everything before the last answer is the prompt. Earlier answers are targets too, unless the template changes
    them when the conversation continues (Qwen3 drops their thinking): a student does not generate the changed text."""
    messages = _add_system_turn(_get_messages(row, args.messages_column), args)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not answers:
        raise ValueError(f"messages_column {args.messages_column!r}: a conversation has no assistant turn: {messages}")
    *earlier, last = answers
    sample = _encode_turn(messages[:last], [messages[last]], row, tokenizer, args)
    ids = sample["input_ids"]
    for i in earlier if not args.teacher_context else ():
        before = _render(messages[:i], tokenizer, args, add_generation_prompt=True)
        after = _cut_after_eos(_render(messages[: i + 1], tokenizer, args), tokenizer)
        if ids[: len(after)] == after and after[: len(before)] == before:
            sample["supervised"][len(before) : len(after)] = [1] * (len(after) - len(before))
    return sample


def _encode_text(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: EncodeOptions) -> dict[str, Any]:
    ids = [*_tokenize(_get_text(row, args.text_column), tokenizer)[0], tokenizer.eos_token_id]
    sample = {"input_ids": ids, "supervised": [1] * len(ids)}
    return sample if args.packing else {**sample, "prompt_length": 0}


def _encode_text_prompt(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: EncodeOptions
) -> dict[str, Any]:
    """The first tokens of a document are the prompt, and the rest is the completion, which may be empty."""
    ids, added = _tokenize(_get_text(row, args.text_column), tokenizer)
    length, teacher = args.text_prompt_length, None
    prompt, completion = ids[:length], ids[length:]
    if completion:
        completion = [*completion, tokenizer.eos_token_id]
    if args.longest_document is not None:
        completion = completion[: args.longest_document - len(prompt)]
    if args.teacher_prompt_prefix is not None:
        # Joined as tokens: the prompt may end within a word. Special tokens go, since the text begins with the prefix.
        words = [i for i, special in zip(prompt, added, strict=False) if not special]
        teacher = [*_tokenize(_format_prefix(row, args), tokenizer)[0], *words]
    return _make_sample(prompt, completion, args.supervise_prompt, teacher)


def _encode_rollout(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: EncodeOptions) -> dict[str, Any]:
    """Use a rollout's tokens unchanged. Only generated tokens are supervised; a truncated completion gets no EOS."""
    prompt, completion = (_get_token_ids(row, column) for column in ROLLOUT_COLUMNS)
    for name, ids in (("prompt", prompt), ("completion", completion)):
        text, decoded = row.get(name), tokenizer.decode(ids)
        if isinstance(text, str) and text != decoded:
            raise ValueError(
                f"the rollouts were generated with another tokenizer, or changed since: the {name}_ids of a row decode "
                f"to {decoded[:80]!r}, and its {name} is {text[:80]!r}; set model_name_or_path to the student that "
                "generated them, or generate new ones with save_rollouts"
            )
    teacher = None
    if row.get("teacher_prompt_ids") is not None:
        teacher = _get_token_ids(row, "teacher_prompt_ids")
        if args.teacher_cache is not None:
            raise ValueError(
                f"teacher_cache {args.teacher_cache!r} holds the teacher's distributions after the student's prompts, "
                "but the rollouts have teacher_prompt_ids of their own; remove teacher_cache, or drop that column"
            )
        if not teacher:
            raise ValueError("column 'teacher_prompt_ids' is empty in a row; drop it, or generate the rollouts again")
    elif args.teacher_context:
        raise ValueError(
            f"{' and '.join(args.teacher_context)} cannot be added to the tokens of a rollout, and the rollouts lack "
            "teacher_prompt_ids; remove it, or generate the rollouts in a run that has it (save_rollouts)"
        )
    sample = _make_sample(prompt, completion, False, teacher)
    return {**sample, "teacher_prompt_ids": teacher} if "teacher_prompt_ids" in row else sample


ENCODERS: dict[str, Encoder] = {
    "pair": _encode_pair,
    "chat": _encode_chat,
    "messages": _encode_messages,
    "text": _encode_text,
    "text_prompt": _encode_text_prompt,
    "rollout": _encode_rollout,
}


def _make_sample(prompt: list[int], completion: list[int], supervise_prompt: bool, teacher: list[int] | None) -> dict:
    supervised = [int(supervise_prompt)] * len(prompt) + [1] * len(completion)
    sample = {"input_ids": [*prompt, *completion], "supervised": supervised, "prompt_length": len(prompt)}
    return sample if teacher is None else {**sample, "teacher_prompt_ids": teacher}


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens of a text, and for each whether the tokenizer added it.

    An EOS that the tokenizer adds is left out: only what ends a completion or a document is EOS.
    """
    encoding = tokenizer(text, return_special_tokens_mask=True)
    ids, added = encoding["input_ids"], encoding["special_tokens_mask"]
    if len(ids) > 1 and added[-1] and ids[-1] == tokenizer.eos_token_id:
        ids, added = ids[:-1], added[:-1]
    return ids, added


def _get_messages(row: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """The messages of a conversation. Messages as ShareGPT writes them (``from``, ``value``) are converted."""
    messages = row[column]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"column {column!r} holds {messages!r}, which is not a list of messages; drop such rows")
    converted = []
    for message in messages:
        if isinstance(message, dict) and "role" not in message and {"from", "value"} <= message.keys():
            message = {"role": ROLES.get(message["from"], message["from"]), "content": message["value"]}
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"column {column!r} holds {message!r}, which is not a message: a message has role and content"
            )
        converted.append(message)
    return converted


def _get_text(row: Mapping[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"column {column!r} holds {row[column]!r}, which is not text")
    return row[column]


def _get_token_ids(row: Mapping[str, Any], column: str) -> list[int]:
    ids = row[column]
    invalid = [ids] if not isinstance(ids, list) else [i for i in ids if not isinstance(i, int) or i < 0 or i is True]
    if invalid:
        raise ValueError(
            f"column {column!r} holds {invalid[0]!r}, which is not a token id; generate the rollouts again"
        )
    return ids


def _format_prefix(row: Mapping[str, Any], args: EncodeOptions) -> str:
    """``teacher_prompt_prefix`` with the row's values in its braces, in one pass: a value may itself contain braces."""
    prefix = str(args.teacher_prompt_prefix)

    def get_value(match: re.Match) -> str:
        name = match[1]
        if name is None:  # {{ or }}
            return match[0][0]
        if name not in row:
            raise ValueError(
                f"teacher_prompt_prefix {prefix!r} names the column {name!r}, and the data's columns are "
                f"{', '.join(map(repr, row))}; name one of them, or write {{{{{name}}}}} for braces in the text"
            )
        if not isinstance(row[name], str | int | float):
            raise ValueError(
                f"column {name!r} holds {row[name]!r}, which teacher_prompt_prefix cannot insert as text; "
                "drop such rows, or name another column"
            )
        return str(row[name])

    return re.sub(r"\{\{|\}\}|\{([^{}]*)\}", get_value, prefix)


def _add_system_turn(messages: list[dict[str, str]], args: EncodeOptions) -> list[dict[str, str]]:
    if args.system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": args.system_prompt}, *messages]


def _add_teacher_context(
    messages: list[dict[str, str]], row: Mapping[str, Any], args: EncodeOptions
) -> list[dict[str, str]]:
    """The teacher's prompt: with its own system turn, and with the prefix in the last user turn."""
    if args.teacher_system_prompt is not None:
        rest = messages[1:] if messages[0]["role"] == "system" else messages
        messages = [{"role": "system", "content": args.teacher_system_prompt}, *rest]
    if args.teacher_prompt_prefix is None:
        return messages
    users = [i for i, m in enumerate(messages) if m["role"] == "user" and isinstance(m["content"], str)]
    if not users:
        raise ValueError(
            f"teacher_prompt_prefix goes before the text of a user turn, and a prompt has no such turn: {messages}"
        )
    last = messages[users[-1]]
    last = {**last, "content": _format_prefix(row, args) + last["content"]}
    return [*messages[: users[-1]], last, *messages[users[-1] + 1 :]]


def _encode_turn(
    prompt: list[dict[str, str]],
    answer: list[dict[str, str]] | None,
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    args: EncodeOptions,
) -> dict[str, Any]:
    prompt_ids, completion, teacher = _render(prompt, tokenizer, args, add_generation_prompt=True), [], None
    if args.teacher_context:
        teacher = _render(_add_teacher_context(prompt, row, args), tokenizer, args, add_generation_prompt=True)
    if answer is not None:
        ids = _render([*prompt, *answer], tokenizer, args)
        if ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError(
                "the chat template renders the prompt differently when an answer follows, so the answer's tokens "
                "cannot be found; use text columns, or a template whose prompt is a prefix of the conversation"
            )
        completion = _cut_after_eos(ids[len(prompt_ids) :], tokenizer)
    return _make_sample(prompt_ids, completion, args.supervise_prompt, teacher)


def _render(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, args: EncodeOptions, **options: bool
) -> list[int]:
    variables: Any = args.chat_template_kwargs or {}  # TrainingArguments parses its text into a dict
    return tokenizer.apply_chat_template(messages, return_dict=False, **options, **variables)


def _cut_after_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Cut what a template adds after the last EOS, since the student never generates it."""
    if tokenizer.eos_token_id not in ids:
        return ids
    return ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
