"""A report as one HTML file: the page, its style, its scripts and its data. It reads nothing from elsewhere."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeGuard

import torch

from sekd.eval.snapshots import NUMBERS, Snapshot
from sekd.files import write_atomically
from sekd.report.more_tables import make_more_tables
from sekd.report.names import name_curve
from sekd.report.read import FINISHED, RunRecord, read_runs
from sekd.report.tables import ReportTable, make_tables
from sekd.selection_config import SelectionConfig
from sekd.selection_words import describe_selection
from sekd.timing import PARTS
from sekd.validation.values import read_field

FOLDER = os.path.dirname(__file__)
SCRIPTS = ("curves.js", "viewer.js", "page.js")
CURVES = (
    *("loss", "entropy", "entropy_selected", "selected_fraction", "completion_length", "cut_fraction"),
    *("rollout_age", "selection_agreement", "grad_norm", "learning_rate", "tokens_per_second", "floor_share"),
)
"""The logged numbers whose curves are shown, besides the divergence and evaluations."""
NO_SCORES = ("runtime", "per_second", "_positions")
"""Endings of the logged numbers of an evaluation that are no scores."""
MAX_POINTS = 1000
"""The points of a curve in the page: a longer one is thinned out."""
MAX_POSITIONS = 20_000
"""The positions of all runs, sequences and snapshots in the page: 3.5 MB. Longer sequences are cut."""
DIGITS = 4
"""Significant digits of numbers in the page."""


@dataclass(frozen=True)
class Report:
    """What a page is made from."""

    runs: list[RunRecord]
    tables: list[ReportTable]


def write_report(folders: Sequence[str], output: str, title: str = "", evaluations: str = "evaluations") -> Report:
    """Write the page of some runs.

    Args:
        folders: of runs or sweeps.
        output: the HTML file.
        title: of the page; by default the names of the runs.
        evaluations: the folder into which ``sekd evaluate`` wrote.

    Raises:
        ValueError: a folder that is no run's.
        OSError: the file cannot be written.
    """
    runs, references, sweeps = read_runs(folders, evaluations)
    tables = [*make_tables(runs, references, sweeps), *make_more_tables(runs, sweeps)]
    report = Report(runs, tables)
    title = title or ", ".join(dict.fromkeys(run.group for run in runs))
    write_atomically(output, make_page(title, report.runs, report.tables))
    return report


def make_page(title: str, runs: Sequence[RunRecord], tables: Sequence[ReportTable]) -> str:
    """The text of the HTML file."""
    number = sum(len(snapshot.samples) for run in runs for snapshot in run.snapshots)
    described = [describe_run(run, f"r{place}", MAX_POSITIONS // max(number, 1)) for place, run in enumerate(runs)]
    data = {
        "title": title,
        "version": f"sekd {version('sekd')}",
        "runs": described,
        "names": {name: name_curve(name) for run in described for name in run["curves"]},
        "tables": [table.as_json() for table in tables],
    }
    parts = {"CSS": _read("page.css"), "JS": "\n".join(map(_read, SCRIPTS)), "DATA": as_script_text(data)}
    page = _read("page.html")
    for name, text in parts.items():
        before, after = page.split(f"/*{name}*/")
        page = before + text + after
    return page.encode("utf-8", "replace").decode()  # names of files may have halves of characters


def as_script_text(data: Any) -> str:
    """JSON that cannot end the element of a page that holds it. Numbers that are not finite become null."""
    text = json.dumps(_clean(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def describe_run(run: RunRecord, name: str, positions: int) -> dict[str, Any]:
    """What the page shows of a run, and of at most so many positions of each sequence."""
    selection, is_cut = _describe_selection(run.snapshots, positions)
    notes = [f"The page has the first {positions:,} positions of each recorded sequence."] * is_cut
    return {
        "id": name,
        "label": run.label,
        "group": run.group,
        "status": run.status,
        "notes": [*run.notes, *_note_status(run), *notes],
        "sentence": describe_recipe(run.keys),
        "facts": list_facts(run),
        "recipe": "\n".join(f"{key}: {value}" for key, value in run.keys.items()),
        "curves": make_curves(run.logs),
        "time": share_time(run.logs),
        "selection": selection,
    }


def describe_recipe(keys: Mapping[str, Any]) -> str:
    """The recipe in a sentence; empty without a recipe."""
    if not keys:
        return ""
    names = [name for name in SelectionConfig.__dataclass_fields__ if name in keys]
    try:
        args = SelectionConfig(**{name: read_field(SelectionConfig, name, keys[name]) for name in names})
        words = describe_selection(args, from_cache=keys.get("teacher_cache") is not None)
    except KeyError as error:  # from a module of the user's
        return f"The recipe has a strategy that is not one of sekd's: {error}."
    except ValueError as error:
        return f"The recipe has a value that sekd cannot read: {error}."
    return f"{words[0].upper()}{words[1:]}.".replace("`", "")


def list_facts(run: RunRecord) -> list[tuple[str, str]]:
    """The facts at the head of a run, those that are known."""
    keys, logs = run.keys, run.logs
    last = logs[-1] if logs else {}
    batch = [keys.get(name, 1) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")]
    rate = keys.get("learning_rate")
    facts = {
        "folder": run.folder,
        "student": keys.get("model_name_or_path"),
        "teacher": keys.get("teacher_model_name_or_path") or keys.get("teacher_cache"),
        "data": keys.get("rollouts") or keys.get("dataset_name"),
        "steps": _count_steps(run),
        "sequences a step": f"{math.prod(batch):,} a process" if keys and _are_numbers(batch) else None,
        "learning rate": f"{rate:g}" if isinstance(rate, int | float) else rate,
        "seed": run.seed,
        "time": f"{seconds:,.0f} s" if (seconds := find_seconds(logs)) else None,
        "peak memory": f"{last['peak_memory_gb']:.1f} GB" if "peak_memory_gb" in last else None,
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _are_numbers(values: Sequence[Any]) -> TypeGuard[Sequence[int]]:
    return all(isinstance(value, int) for value in values)


def find_seconds(logs: Sequence[Mapping[str, Any]]) -> float | None:
    """The seconds of training up to the last log, without evaluations; None if they are not logged."""
    return next((log["train_seconds"] for log in reversed(logs) if "train_seconds" in log), None)


def _count_steps(run: RunRecord) -> str:
    of = run.keys.get("max_steps")
    return f"{run.done:,} of {of:,}" if isinstance(of, int) and of > 0 else f"{run.done:,}"


def _note_status(run: RunRecord) -> list[str]:
    if run.status == FINISHED:
        return []
    return [f"The run is {run.status}: this is what it has written up to step {run.done}."]


def make_curves(logs: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The points of each curve, by the name of the logged number."""
    names = dict.fromkeys(name for log in logs for name in log)
    divergences = [name for name in names if name.endswith("_selected") and name != "entropy_selected"]
    evaluations = [
        n for n in names if n.startswith("eval_") and not n.endswith(("runtime", "per_second", "_positions"))
    ]
    curves = {}
    for name in ("loss", *divergences, *CURVES[1:], *evaluations):
        points = [(log["step"], log[name]) for log in logs if isinstance(log.get(name), int | float)]
        if any(value for _, value in points):  # rollouts of the current step have the age 0 all the time
            curves[name] = thin_out(points)
    return curves


def thin_out(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most MAX_POINTS points: of each part of the curve, the lowest and the highest."""
    if len(points) <= MAX_POINTS:
        return [*points]
    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept = list[tuple[int, float]]()
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def share_time(logs: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """The seconds of each part of the run; of a run without its last log, the mean share of each part."""
    for log in reversed(logs):
        if "other_seconds" in log:
            seconds = [(part, log.get(f"{part}_seconds")) for part in (*PARTS, "other")]
            return [(part, value) for part, value in seconds if value]
    shares = [log for log in logs if any(name == f"{part}_share" for part in PARTS for name in log)]
    means = [(part, sum(log.get(f"{part}_share", 0.0) for log in shares) / len(shares)) for part in PARTS if shares]
    return [(part, mean) for part, mean in means if mean]


def _describe_selection(snapshots: Sequence[Snapshot], positions: int) -> tuple[dict[str, Any] | None, bool]:
    """The snapshots as the selection viewer reads them, None if there are none; and whether a sequence is cut."""
    if not snapshots:
        return None, False
    first = snapshots[0]
    texts = {token: text for snapshot in snapshots for token, text in snapshot.texts.items()}
    samples, shown, is_cut = list[dict[str, Any]](), set[int](), False
    for place, sample in enumerate(first.samples):
        mine = [(snapshot.columns["sample"] == place).nonzero()[:, 0] for snapshot in snapshots]
        columns = [_list_columns(s, rows[:positions]) for s, rows in zip(snapshots, mine, strict=True)]
        places = first.columns["position"][mine[0][:positions]].tolist()
        cut = len(places) < len(mine[0])
        is_cut |= cut
        tokens = sample["input_ids"][: places[-1] + 2] if cut and places else sample["input_ids"]
        shown |= {
            *tokens,
            *(t for c in columns for m in ("student_top", "teacher_top") for ids in c[m]["ids"] for t in ids),
        }
        samples.append({"id": sample["sample_id"], "tokens": tokens, "positions": places, "snapshots": columns})
    selection = {
        "source": first.source,
        "score_names": first.scores,
        "steps": [snapshot.step for snapshot in snapshots],
        "vocab": {str(token): texts[token] for token in sorted(shown) if token in texts},
        "samples": samples,
    }
    return selection, is_cut


def _list_columns(snapshot: Snapshot, rows: torch.Tensor) -> dict[str, Any]:
    columns = {name: column[rows] for name, column in snapshot.columns.items()}
    is_known = {name: not columns[name].isnan().all() for name in (*NUMBERS, "weight")}
    numbers = {name: columns[name].tolist() if known else None for name, known in is_known.items()}
    tops = {
        f"{model}_top": {"ids": columns[f"{model}_ids"].tolist(), "probs": columns[f"{model}_probs"].tolist()}
        for model in ("student", "teacher")
    }
    return {**numbers, "scores": columns["scores"].T.tolist(), **tops}


def _clean(value: Any) -> Any:
    """The value with rounded numbers, and None for numbers that JSON does not have."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list | tuple) else value


def _read(name: str) -> str:
    with open(os.path.join(FOLDER, name), encoding="utf-8") as file:
        return file.read()
