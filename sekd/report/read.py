"""What a report reads of runs: recipes, logs, snapshots and evaluations, also of runs that are not finished.

Nothing here writes into a run's folder. What cannot be read is left out, and a note says so.
"""

import csv
import glob
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from sekd.eval.records import TaskResult
from sekd.eval.result_files import load_results, name_folder
from sekd.eval.snapshots import FOLDER, Snapshot, list_snapshots, read_snapshot
from sekd.eval.statistics import SeedErrors
from sekd.files import DamagedFile, is_locked
from sekd.metric_kinds import MetricKind
from sekd.profiling import CURVE
from sekd.profiling import FOLDER as PROFILE
from sekd.sweep.table import Cell
from sekd.versions import installed_versions

RECIPE, METRICS, VERSIONS = "recipe.yaml", "metrics.jsonl", "versions.json"
SWEEP_RESULTS = "results.json"
NOT_OF_GROUP = {
    *("seed", "data_seed", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "project"),
    *("report_to", "profile", "record_selection", "disable_tqdm", "push_to_hub", "samples_file", "local_rank"),
}
"""Keys in which runs of a group may differ."""
LARGEST = 1e300
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
        in_sweep: whether a sweep's table has its scores.
        memory: seconds and bytes over the profiled steps; empty without a profile.
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
    in_sweep: bool = False
    memory: Sequence[tuple[float, float]] = ()

    @property
    def seed(self) -> int | None:
        """The seed of the recipe; None if it has none."""
        seed = self.keys.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def max_steps(self) -> int | None:
        """The number of its optimizer steps. If epochs decide, it follows from the last log. None if it is unknown."""
        steps, epochs = self.keys.get("max_steps"), self.keys.get("num_train_epochs")
        if isinstance(steps, int) and steps > 0:
            return steps
        log = next((log for log in reversed(self.logs) if log.get("epoch")), None)
        if log is None or not isinstance(epochs, int | float):
            return None
        return max(log["step"], round(log["step"] * epochs / log["epoch"]))

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
class SweepLine:
    """A line of a sweep's table: a method, its point of the grid, the folders of its runs, its scores by column."""

    method: str
    point: str
    folders: list[str]
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class SweepRecord:
    """The table of a sweep, as ``results.json`` in its folder has it.

    Attributes:
        folder: the sweep's ``output_dir``.
        title: of the table.
        baseline: the method that the others are compared with.
        kinds: of the columns that are shown, main scores first.
        main: the first main score; None without one.
        lines: references and methods.
    """

    folder: str
    title: str
    baseline: str | None
    kinds: Mapping[str, MetricKind]
    main: str | None
    lines: Sequence[SweepLine]


@dataclass(frozen=True)
class ReportInputs:
    """What a report is made from. ``notes`` say what could not be read."""

    runs: list[RunRecord]
    references: list[Reference]
    sweeps: list[SweepRecord]
    notes: list[str]


def read_runs(folders: Sequence[str], evaluations: str) -> ReportInputs:
    """The runs of some folders, the models that they began from and learn from, and the tables of sweeps.

    The folder of a sweep stands for the runs of its table.

    Args:
        folders: of runs or sweeps. A folder that is named twice counts once.
        evaluations: the folder into which ``sekd evaluate`` wrote; it may be missing.

    Raises:
        ValueError: a folder does not exist, or is neither a run's nor a sweep's.
        DamagedFile: the table of a sweep is damaged, or another version of sekd wrote it.
    """
    runs, sweeps, notes = list[RunRecord](), list[SweepRecord](), list[str]()
    for folder in {os.path.realpath(folder): folder for folder in folders}.values():
        if os.path.isdir(folder) and (sweep := read_sweep(folder)) is not None:
            sweeps.append(sweep)
            for line in sweep.lines:
                for name in line.folders:
                    path = os.path.join(folder, name)
                    if is_run(path):
                        runs.append(replace(read_run(path, evaluations, line.method), in_sweep=True))
                    else:
                        notes.append(f"The run {name} of {line.method} is missing in {folder}.")
        else:
            check_run(folder)
            runs.append(read_run(folder, evaluations))
    return ReportInputs(name_groups(runs), find_references(runs, evaluations, notes), sweeps, notes)


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
    """The table of a sweep; None if the folder has none.

    Raises:
        DamagedFile: ``results.json`` is damaged, or another version of sekd wrote it.
    """
    path = os.path.join(folder, SWEEP_RESULTS)
    if not os.path.isfile(path) or is_run(folder):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        columns = sorted(content["columns"].items(), key=lambda item: not item[1]["main"])
        kinds = {
            label: MetricKind(kind["higher_is_better"], kind["is_share"], kind["digits"])
            for label, kind in columns
            if kind["shown"]
        }
        lines = [
            SweepLine(
                line["method"],
                line["point"],
                [*line["runs"].values()],
                {label: _read_cell(score) for label, score in line["scores"].items()},
            )
            for line in content["lines"]
        ]
        title = content.get("title") or f"Sweep {content['sweep']}"
        main = next((label for label, kind in columns if kind["main"] and kind["shown"]), None)
        return SweepRecord(folder, title, content["baseline"], kinds, main, lines)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(
            f"{path!r} is damaged, or another version of sekd wrote it ({error!r}); make it again with `sekd sweep "
            "FILE --only-table`, or name the folders of its runs"
        ) from error


def _read_cell(score: Mapping[str, Any]) -> Cell:
    fields = {name: value for name, value in score.items() if name != "values"}
    return Cell(**{**fields, "mean": float(score["mean"]), "errors": SeedErrors(**score["errors"])})


def read_run(folder: str, evaluations: str | None, label: str = "") -> RunRecord:
    """A run in its folder, as far as it can be read; without its evaluations if ``evaluations`` is None."""
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
        {} if evaluations is None else _read_results(folder, evaluations, notes),
        memory=_read_memory(os.path.join(folder, PROFILE, CURVE), notes),
    )


def find_status(folder: str, logs: Sequence[Mapping[str, Any]]) -> str:
    """Whether a run is finished, still runs, or ended before its last step."""
    if any("train_loss" in log for log in logs):
        return FINISHED
    return RUNNING if is_locked(folder) else UNFINISHED


def find_last(logs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The last value of a logged number; None if it was never logged, or is not finite."""
    value = next((log[name] for log in reversed(logs) if name in log), None)
    return value if value is not None and math.isfinite(value) else None


def name_groups(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs, with short names for their groups, and labels that tell the runs apart."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    names: dict[str, str] = {}
    for group, members in groups.items():
        first = members[0].label
        name = re.sub(r"[-_. ]*seed[-_= ]*\d+$", "", first) if len(members) > 1 else first
        same = sum(other.startswith(f"{name} (") or other == name for other in names.values())
        names[group] = f"{name} ({same + 1})" if same else name
    named, labels = list[RunRecord](), set[str]()
    for run in runs:
        name, several = names[run.group], len(groups[run.group]) > 1
        label = f"{name}, seed {run.seed}" if several else name
        label = label if label not in labels else f"{label} ({run.folder})"
        labels.add(label)
        named.append(replace(run, group=name, label=label))
    return named


def find_references(runs: Sequence[RunRecord], evaluations: str, notes: list[str]) -> list[Reference]:
    """The evaluated models that the runs learn from and began from, teachers first."""
    references = list[Reference]()
    for key, role in (("teacher_model_name_or_path", "teacher"), ("model_name_or_path", "student before")):
        names = dict.fromkeys(str(run.keys[key]) for run in runs if run.keys.get(key))
        for name in names:
            results = _load_results(name_folder(evaluations, name), notes)
            if results:
                label = role if len(names) == 1 else f"{role} ({os.path.basename(os.path.normpath(name))})"
                references.append(Reference(label, results))
    return references


def _is_of_group(key: str) -> bool:
    return key not in NOT_OF_GROUP and not key.startswith(("log", "save_", "hub_", "trackio_"))


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
                    logs.append(
                        {name: _as_number(value) for name, value in log.items() if isinstance(value, int | float)}
                    )
                else:
                    damaged += 1
    except FileNotFoundError:
        notes.append("There is no metrics.jsonl: nothing was logged yet.")
    if damaged:
        lines = "1 damaged line" if damaged == 1 else f"{damaged} damaged lines"
        notes.append(f"{lines} of metrics.jsonl {'was' if damaged == 1 else 'were'} skipped.")
    return logs


def _as_number(value: int | float) -> int | float:
    """The number, where it is one that a float can hold."""
    return value if abs(value) < LARGEST else math.nan


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
    snapshots = [snapshot for snapshot in snapshots if snapshot.samples]
    same = [snapshot for snapshot in snapshots if snapshot.samples == snapshots[0].samples]
    if len(same) < len(snapshots):
        notes.append(f"{len(snapshots) - len(same)} snapshots of other sequences than the first were skipped.")
    return same


def _read_memory(path: str, notes: list[str]) -> list[tuple[float, float]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            points = [(float(row["seconds"]), float(row["bytes"])) for row in csv.DictReader(file)]
        if not all(abs(number) < LARGEST for point in points for number in point):  # not if one is NaN
            raise ValueError(path)
        return points
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        notes.append("The memory of the profile is damaged, and left out.")
        return []


def _read_results(folder: str, evaluations: str, notes: list[str]) -> dict[str, TaskResult]:
    """The evaluations of a run's student by ``sekd evaluate``, and by a sweep, which keeps them in the run's folder."""
    outputs = [evaluations, *sorted(glob.glob(os.path.join(glob.escape(folder), "evaluations", "*")))]
    results: dict[str, TaskResult] = {}
    for output in outputs:
        results |= _load_results(name_folder(output, folder), notes)
    return results


def _load_results(folder: str, notes: list[str]) -> dict[str, TaskResult]:
    try:
        return load_results(folder)
    except DamagedFile as error:
        notes.append(f"An evaluation was skipped: {error}.")
        return {}
