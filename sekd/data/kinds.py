"""Which kind of rows does a dataset have, and does it work with the tokenizer and the configuration?

The kinds are those of :data:`sekd.data.encode.ENCODERS`.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from sekd.config import SEKDConfig

ROLLOUT_COLUMNS = ("prompt_ids", "completion_ids")
"""A row with these columns is a rollout that was generated before. Its tokens are used unchanged."""


def detect_kind(first: Mapping[str, Any], args: SEKDConfig) -> str:
    """Detect the kind of a dataset's rows from the columns of the first row.

    Raises:
        ValueError: a missing column (the error lists the columns of the data), or plain text where prompts are needed.
    """
    if all(column in first for column in ROLLOUT_COLUMNS):
        return "rollout"
    if args.prompt_column in first:
        if args.completion_column not in first and not args.all_on_policy:
            raise _missing_column_error(args, first, ["completion_column"])
        return "chat" if args.use_chat_template or isinstance(first[args.prompt_column], list) else "pair"
    if args.messages_column in first:
        return "messages"
    if args.text_column not in first:
        raise _missing_column_error(args, first, ["prompt_column", "messages_column", "text_column"])
    if args.text_prompt_length is not None:
        return "text_prompt"
    if args.any_on_policy:
        raise ValueError(
            f"lmbda {args.lmbda} needs prompts, and the data is plain text (text_column {args.text_column!r}): set "
            "text_prompt_length to the number of first tokens of a document that are its prompt, or set lmbda: 0"
        )
    return "text"


def check_kind(kind: str, tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> None:
    """Check that rows of this kind work with the tokenizer, the limits on length and the teacher's context.

    Raises:
        ValueError: a combination that cannot work; the error says what to set.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so the student cannot learn to stop: set tokenizer.eos_token")
    if kind == "text_prompt" and args.max_length <= (args.text_prompt_length or 0):
        raise ValueError(
            f"max_length {args.max_length} leaves no room after a text_prompt_length of {args.text_prompt_length}; "
            "raise the first or lower the second"
        )
    if kind not in ("text", "text_prompt") and not args.all_on_policy and args.max_length <= args.max_prompt_length:
        raise ValueError(
            f"max_length {args.max_length} leaves no room for completions after prompts of max_prompt_length "
            f"{args.max_prompt_length}; raise the first or lower the second"
        )
    if kind in ("chat", "messages") and tokenizer.chat_template is None:
        raise ValueError(
            "the data is a conversation, but the tokenizer has no chat template: set one, or use text prompts"
        )
    if kind == "text" and args.teacher_context:
        raise ValueError(
            f"{' and '.join(args.teacher_context)}: plain text has no prompt that the teacher's context could change; "
            "set text_prompt_length, use data with prompts, or remove the teacher's context"
        )
    if kind in ("pair", "text_prompt") and args.teacher_system_prompt is not None:
        alternative = ", or set use_chat_template: true" if kind == "pair" else ""
        raise ValueError(
            f"teacher_system_prompt {args.teacher_system_prompt!r} is a turn of a chat, and the prompts are text: use "
            f"teacher_prompt_prefix{alternative}"
        )


def _missing_column_error(args: SEKDConfig, first: Mapping[str, Any], fields: list[str]) -> ValueError:
    missing = " or ".join(f"{name}: {getattr(args, name)!r}" for name in fields)
    return ValueError(
        f"the data lacks {missing}; its columns are {', '.join(map(repr, first))}. Set the field to one of them, "
        "or convert the data: docs/data.md has examples"
    )
