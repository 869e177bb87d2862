"""What a report reads of runs: recipes, logs, snapshots and evaluations, also of runs that are not finished.

Nothing here writes into a run's folder. What cannot be read is left out, and a note says so.
"""

import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from sekd.checkpoints import RunRefused
from sekd.eval.records import TaskResult
from sekd.eval.result_files import load_results, name_folder
from sekd.eval.snapshots import FOLDER, Snapshot, list_snapshots, read_snapshot
from sekd.files import DamagedFile
from sekd.run_folder import MAY_CHANGE, lock_run
from sekd.versions import installed_versions

RECIPE, METRICS, VERSIONS = "recipe.yaml", "metrics.jsonl", "versions.json"
SWEEP_RESULTS = "results.json"
FINISHED, RUNNING, UNFINISHED = "finished", "running", "unfinished"


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run.

    Attributes:
        folder: its ``output_dir``.
        label: its name in the report.
        group: runs that differ in the seed alone have the same group.
        keys: the keys of its recipe; empty if there is no recipe.
        logs: its logs, in order.
        status: finished, running (another process writes into the folder) or unfinished.
        notes: what could not be read, in sentences.
        snapshots: of the selection, by step.
        results: its evaluations, by name.
    """

    folder: str
    label: str
    group: str
    keys: Mapping[str, Any]
    logs: Sequence[Mapping[str, Any]]
    status: str
    notes: list[str] = field(default_factory=list)
    snapshots: Sequence[Snapshot] = ()
    results: Mapping[str, TaskResult] = field(default_factory=dict)

    @property
    def seed(self) -> int | None:
        """The seed of the recipe; None if it has none."""
        seed = self.keys.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def done(self) -> int:
        """The number of optimizer steps that are logged."""
        return max((int(log.get("step", 0)) for log in self.logs), default=0)


@dataclass(frozen=True)
class Reference:
    """A model that was not trained here: a teacher, or a student before its training."""

    label: str
    results: Mapping[str, TaskResult]


@dataclass(frozen=True)
class SweepRecord:
    """The table of a sweep, as ``results.json`` in its folder has it."""

    folder: str
    content: Mapping[str, Any]


def read_runs(folders: Sequence[str], evaluations: str) -> tuple[list[RunRecord], list[Reference], list[SweepRecord]]:
    """The runs of some folders, the models that they began from and learn from, and the tables of sweeps.

    The folder of a sweep stands for the runs of its table.

    Args:
        folders: of runs or sweeps.
        evaluations: the folder into which ``sekd evaluate`` wrote; it may be missing.

    Raises:
        ValueError: a folder does not exist, or is neither a run's nor a sweep's.
    """
    runs, sweeps = list[RunRecord](), list[SweepRecord]()
    for folder in folders:
        if os.path.isdir(folder) and (sweep := read_sweep(folder)) is not None:
            sweeps.append(sweep)
            for line in sweep.content["lines"]:
                paths = [os.path.join(folder, name) for name in line.get("runs", {}).values()]
                runs += [read_run(path, evaluations, line["method"]) for path in paths if is_run(path)]
        else:
            check_run(folder)
            runs.append(read_run(folder, evaluations))
    return name_groups(runs), find_references(runs, evaluations), sweeps


def check_run(folder: str) -> None:
    """Raise ValueError if a folder does not exist, or is no run's."""
    if not os.path.isdir(folder):
        raise ValueError(f"there is no folder {folder!r}; name the output_dir of a run or a sweep")
    if not is_run(folder):
        raise ValueError(
            f"{folder!r} is no run's folder: it has neither {METRICS} nor {RECIPE}; name the output_dir of a run, or "
            "of a sweep that has made its table"
        )


def is_run(folder: str) -> bool:
    """Whether a run has begun in a folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in (METRICS, RECIPE))


def read_sweep(folder: str) -> SweepRecord | None:
    """The table of a sweep; None if the folder is no sweep's."""
    try:
        with open(os.path.join(folder, SWEEP_RESULTS), encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return None
    is_table = isinstance(content, dict) and isinstance(content.get("lines"), list)
    return SweepRecord(folder, content) if is_table else None


def read_run(folder: str, evaluations: str, label: str = "") -> RunRecord:
    """A run in its folder, as far as it can be read."""
    notes = list[str]()
    keys = _read_keys(os.path.join(folder, RECIPE), notes)
    logs = _read_logs(os.path.join(folder, METRICS), notes)
    _note_version(os.path.join(folder, VERSIONS), notes)
    name = label or os.path.basename(os.path.normpath(os.path.abspath(folder)))
    group = json.dumps([label, sorted((key, str(value)) for key, value in keys.items() if _is_of_group(key))])
    return RunRecord(
        folder,
        name,
        group if keys else folder,
        keys,
        logs,
        find_status(folder, logs),
        notes,
        _read_snapshots(folder, notes),
        _read_results(folder, evaluations, notes),
    )


def find_status(folder: str, logs: Sequence[Mapping[str, Any]]) -> str:
    """Whether a run is finished, still runs, or ended before its last step."""
    if (logs and "train_loss" in logs[-1]) or any("train_loss" in log for log in logs):
        return FINISHED
    try:
        with lock_run(folder):
            return UNFINISHED
    except RunRefused:
        return RUNNING


def name_groups(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs, with short names for their groups, and labels that tell the runs apart."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    names: dict[str, str] = {}
    for group, members in groups.items():
        name = re.sub(r"[-_. ]*seed[-_= ]*\d+$", "", members[0].label) if len(members) > 1 else members[0].label
        while name in names.values():
            name += "'"
        names[group] = name
    named = list[RunRecord]()
    for run in runs:
        name, several = names[run.group], len(groups[run.group]) > 1
        named.append(replace(run, group=name, label=f"{name}, seed {run.seed}" if several else name))
    return named


def find_references(runs: Sequence[RunRecord], evaluations: str) -> list[Reference]:
    """The evaluated models that the runs learn from and began from, teachers first."""
    references = list[Reference]()
    for key, role in (("teacher_model_name_or_path", "teacher"), ("model_name_or_path", "student before")):
        names = dict.fromkeys(str(run.keys[key]) for run in runs if run.keys.get(key))
        for name in names:
            results = _load(name_folder(evaluations, name), [])
            if results:
                label = role if len(names) == 1 else f"{role} ({os.path.basename(os.path.normpath(name))})"
                references.append(Reference(label, results))
    return references


def _is_of_group(key: str) -> bool:
    return key not in MAY_CHANGE and key not in ("seed", "data_seed") and not key.startswith(("log", "save", "hub_"))


def _read_keys(path: str, notes: list[str]) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            keys = yaml.safe_load(file)
    except FileNotFoundError:
        notes.append("There is no recipe.yaml.")
        return {}
    except (OSError, ValueError, yaml.YAMLError):
        notes.append("recipe.yaml is damaged.")
        return {}
    if not isinstance(keys, dict):
        notes.append("recipe.yaml is damaged.")
        return {}
    return {str(key): value for key, value in keys.items()}


def _read_logs(path: str, notes: list[str]) -> list[dict[str, Any]]:
    """The numbers in the lines of the log. A killed process may have left a part of a line."""
    logs, damaged = list[dict[str, Any]](), 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    log = json.loads(line)
                except (ValueError, RecursionError):
                    log = None
                if isinstance(log, dict) and isinstance(log.get("step"), int):
                    logs.append({name: value for name, value in log.items() if isinstance(value, int | float)})
                else:
                    damaged += 1
    except FileNotFoundError:
        notes.append("There is no metrics.jsonl: nothing was logged yet.")
    if damaged:
        lines = "1 damaged line" if damaged == 1 else f"{damaged} damaged lines"
        notes.append(f"{lines} of metrics.jsonl {'was' if damaged == 1 else 'were'} skipped.")
    return logs


def _note_version(path: str, notes: list[str]) -> None:
    try:
        with open(path, encoding="utf-8") as file:
            written = json.load(file)["sekd"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if written != (own := installed_versions()["sekd"]):
        notes.append(f"sekd {written} wrote this run, and sekd {own} reads it.")


def _read_snapshots(folder: str, notes: list[str]) -> list[Snapshot]:
    snapshots = list[Snapshot]()
    for path in list_snapshots(os.path.join(folder, FOLDER)).values():
        try:
            snapshots.append(read_snapshot(path))
        except DamagedFile as error:
            notes.append(f"A snapshot of the selection was skipped: {error}.")
    same = [snapshot for snapshot in snapshots if snapshot.samples == snapshots[0].samples]
    if len(same) < len(snapshots):
        notes.append(f"{len(snapshots) - len(same)} snapshots of other sequences than the first were skipped.")
    return same


def _read_results(folder: str, evaluations: str, notes: list[str]) -> dict[str, TaskResult]:
    """The evaluations of a run's student: those of ``sekd evaluate``, and those of a sweep in the run's folder."""
    outputs = [evaluations, *sorted(glob.glob(os.path.join(glob.escape(folder), "evaluations", "*")))]
    results: dict[str, TaskResult] = {}
    for output in outputs:
        results |= _load(name_folder(output, folder), notes)
    return results


def _load(folder: str, notes: list[str]) -> dict[str, TaskResult]:
    try:
        return load_results(folder)
    except DamagedFile as error:
        notes.append(f"An evaluation was skipped: {error}.")
        return {}
