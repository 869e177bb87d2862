"""Rollouts that are kept or shown: the file of all rollouts, the state in a checkpoint, and a table."""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from rollouts import Rollout
from sekd.data.batch import Sample
from sekd.files import write_atomically
from sekd.tables import escape_controls, print_table

logger = logging.get_logger(__name__)


def show_completions(tokenizer: PreTrainedTokenizerBase, rollouts: Sequence[Rollout], step: int) -> None:
    """Print a few prompts and the student's completions."""
    table = Table(title=f"rollouts at step {step}", show_lines=True, title_justify="left")
    table.add_column("prompt", ratio=2)
    table.add_column("completion", ratio=3)
    for rollout in rollouts:
        table.add_row(*(escape_controls(tokenizer.decode(ids)) for ids in (rollout.prompt_ids, rollout.completion_ids)))
    print_table(table)


# The file of all rollouts that were trained on, one JSON object per line


def append_rollouts(
    path: str, step: int, samples: Sequence[Sample], rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Append the rollouts of a step."""
    lines = [_to_json(step, *pair, tokenizer=tokenizer) for pair in zip(samples, rollouts, strict=True)]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a") as file:
        file.write("".join(lines))


def start_file(path: str) -> None:
    """Begin without a file: rename the file of an earlier run to the first free ``NAME.old1.jsonl``."""
    if os.path.exists(path):
        stem, ending = os.path.splitext(path)
        names = (f"{stem}.old{number}{ending}" for number in itertools.count(1))
        free = next(name for name in names if not os.path.exists(name))
        os.rename(path, free)
        logger.warning(f"the rollouts of an earlier run are in {free} now")


def resume_file(path: str, step: int) -> None:
    """Keep only the rollouts of steps before ``step``, since the others will be generated again."""
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in read_whole_lines(path) if line["step"] < step))


def read_whole_lines(path: str) -> Iterator[dict[str, Any]]:
    """The rollouts of a file; none without a file. A killed process may have written a part of a line."""
    if not os.path.exists(path):
        return
    with open(path) as file:
        for line in file:
            with suppress(ValueError):
                if line.endswith("\n"):
                    yield json.loads(line)


def _to_json(step: int, sample: Sample, rollout: Rollout, tokenizer: Any) -> str:
    """A line of the file: token ids for programs, and the same as text for readers."""
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


# The rollouts in a checkpoint, by step: generated, and not trained on yet


def save_rollouts(path: str, rollouts: Mapping[int, Sequence[Rollout]]) -> None:
    """Write rollouts by step; no file without rollouts."""
    if rollouts:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.save({step: [*map(_to_state, of_step)] for step, of_step in rollouts.items()}, path)


def load_rollouts(path: str) -> dict[int, list[Rollout]]:
    """Rollouts by step; none if there is no file."""
    if not os.path.exists(path):
        return {}
    states = torch.load(path, weights_only=True)
    return {step: [*map(_from_state, of_step)] for step, of_step in states.items()}


def _to_state(rollout: Rollout) -> dict[str, Any]:
    state = {name: getattr(rollout, name) for name in rollout.__slots__}
    if rollout.top_logprobs is not None:  # torch.load with weights_only reads tensors, but not arrays
        state["top_logprobs"] = torch.from_numpy(rollout.top_logprobs)
    return state


def _from_state(state: dict[str, Any]) -> Rollout:
    top = state["top_logprobs"]
    return Rollout(**state | {"top_logprobs": None if top is None else top.numpy()})
