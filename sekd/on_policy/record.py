"""What is kept and shown of rollouts: lines of a file, the state of a checkpoint, a table."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    PreTrainedTokenizerBase,
)

from rollouts import Rollout
from sekd.data.batch import Sample


def show_completions(tokenizer: PreTrainedTokenizerBase, rollouts: Sequence[Rollout], step: int) -> None:
    """Print a few prompts and what the student made of them."""
    table = Table(title=f"rollouts at step {step}", show_lines=True, title_justify="left")
    table.add_column("prompt", ratio=2)
    table.add_column("completion", ratio=3)
    for rollout in rollouts:
        table.add_row(*(tokenizer.decode(ids) for ids in (rollout.prompt_ids, rollout.completion_ids)))
    Console().print(table, markup=False)


def _as_state(rollout: Rollout) -> dict[str, Any]:
    state = {name: getattr(rollout, name) for name in rollout.__slots__}
    if rollout.top_logprobs is not None:  # torch.load takes tensors
        state["top_logprobs"] = torch.from_numpy(rollout.top_logprobs)
    return state


def _from_state(state: dict[str, Any]) -> Rollout:
    top = state["top_logprobs"]
    return Rollout(**state | {"top_logprobs": None if top is None else top.numpy()})


def _as_line(step: int, sample: Sample, rollout: Rollout, tokenizer: Any) -> str:
    """A line of the file of all rollouts: token ids for a machine, and the same as text."""
    line = {
        "step": step,
        "weights_step": rollout.weights_step,
        "sample_id": sample.sample_id,
        "finish_reason": rollout.finish_reason,
        "prompt": tokenizer.decode(rollout.prompt_ids),
        "completion": tokenizer.decode(rollout.completion_ids),
        "prompt_ids": rollout.prompt_ids,
        "completion_ids": rollout.completion_ids,
    }
    if sample.teacher_prompt_ids is not None:
        line["teacher_prompt_ids"] = sample.teacher_prompt_ids
    return json.dumps(line) + "\n"


def _lines_before(path: str, step: int) -> Iterator[str]:
    """The whole lines of steps before ``step``: a killed run wrote others, which will be written again."""
    if not os.path.exists(path):
        return
    with open(path) as file:
        for line in file:
            with suppress(ValueError):
                if line.endswith("\n") and json.loads(line)["step"] < step:
                    yield line
