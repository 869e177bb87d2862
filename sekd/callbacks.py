"""Callbacks: the progress line, and the files in a run's folder."""

import json
import os
import platform
from collections.abc import Mapping
from typing import Any

import yaml
from transformers import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sekd.files import write_atomically
from sekd.metrics import format_line
from sekd.run_folder import list_keys
from sekd.versions import installed_versions


class ProgressLine(ProgressCallback):
    """The progress bar. Each log is one short line instead of a dictionary.

    Args:
        forms: how the line shows metrics of evaluations, by their names without ``eval_``; it may grow.
    """

    def __init__(self, forms: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.forms = {} if forms is None else forms

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        line = format_line(logs or {}, {f"eval_{name}": form for name, form in self.forms.items()})
        if not line or not state.is_world_process_zero:
            return
        if self.training_bar is not None:
            self.training_bar.write(f"step {state.global_step:>5}  {line}")
        else:
            print(f"step {state.global_step:>5}  {line}")


class RunFiles(TrainerCallback):
    """Writes ``recipe.yaml`` (every field of ``records``), ``versions.json`` and ``metrics.jsonl`` (one line a log)."""

    def __init__(self, *records: Any) -> None:
        self.records = records
        self.has_begun = False  # until then the folder may be another run's

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.has_begun = True
        if not state.is_world_process_zero:
            return
        versions = {"python": platform.python_version(), **installed_versions()}
        # metrics.jsonl is written again from the checkpoint, since a resumed run logs the steps after it again.
        lines = [json.dumps(entry, sort_keys=True) + "\n" for entry in state.log_history]
        for name, text in (
            ("recipe.yaml", as_recipe(*self.records)),
            ("versions.json", json.dumps(versions, indent=2) + "\n"),
            ("metrics.jsonl", "".join(lines)),
        ):
            write_atomically(os.path.join(args.output_dir, name), text)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.has_begun and state.is_world_process_zero and state.log_history:
            with open(os.path.join(args.output_dir, "metrics.jsonl"), "a") as file:
                file.write(json.dumps(state.log_history[-1], sort_keys=True) + "\n")


def as_recipe(*records: Any) -> str:
    """All fields of the records as flat YAML, which ``sekd train`` can read."""
    return yaml.safe_dump(list_keys(records), sort_keys=False, allow_unicode=True)
