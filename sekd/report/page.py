"""A report as one HTML file: the page, its style, its scripts and its data. It reads nothing from elsewhere."""

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, TypeGuard

import torch

from sekd.eval.snapshots import NUMBERS, Snapshot
from sekd.files import write_atomically
from sekd.report.charts import Chart, make_charts, thin_out
from sekd.report.more_tables import make_more_tables
from sekd.report.names import NO_SCORES, name_curve
from sekd.report.read import FINISHED, RunRecord, find_last, read_runs
from sekd.report.tables import ReportTable, make_tables
from sekd.selection_config import SelectionConfig
from sekd.selection_words import describe_selection
from sekd.timing import PARTS
from sekd.validation.values import read_field

FOLDER = os.path.dirname(__file__)
SCRIPTS = ("dom.js", "charts.js", "curves.js", "colors.js", "detail.js", "viewer.js", "page.js")
CURVES = (
    *("entropy", "entropy_selected", "selected_fraction", "completion_length", "cut_fraction"),
    *("rollout_age", "selection_agreement", "grad_norm", "learning_rate", "tokens_per_second", "floor_share"),
)
"""The logged numbers whose curves are shown, besides the loss, the divergence and evaluations."""
MAX_POINTS = 80_000
"""The points of all curves in the page: longer ones are thinned out, to ``FEW_POINTS`` at least."""
FEW_POINTS = 50
MAX_POSITIONS = 20_000
"""The positions of all runs, sequences and snapshots in the page: 3.5 MB. Longer sequences are cut."""
DIGITS = 4
"""Significant digits of numbers in the page."""


@dataclass(frozen=True)
class Report:
    """What a page is made from."""

    title: str
    runs: list[RunRecord]
    tables: list[ReportTable]
    charts: list[Chart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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
    inputs = read_runs(folders, evaluations)
    tables = make_tables(inputs.runs, inputs.references, inputs.sweeps, inputs.notes)
    tables += make_more_tables(inputs.runs, inputs.sweeps)
    title = title or ", ".join(dict.fromkeys(run.group for run in inputs.runs))
    report = Report(title, inputs.runs, tables, make_charts(inputs.runs, inputs.sweeps), inputs.notes)
    write_atomically(output, make_page(report))
    return report


def make_page(report: Report) -> str:
    """The text of the HTML file. Of runs that differ in the seed, it has the selection of the first one."""
    first = {run.group: run for run in reversed(report.runs) if run.snapshots}
    runs = [run if run is first.get(run.group) else replace(run, snapshots=()) for run in report.runs]
    number = sum(len(snapshot.samples) for run in runs for snapshot in run.snapshots)
    described = [describe_run(run, MAX_POSITIONS // max(number, 1), MAX_POINTS // max(len(runs), 1)) for run in runs]
    data = {
        "title": report.title,
        "notes": report.notes,
        "version": f"sekd {version('sekd')}",
        "runs": described,
        "names": {name: name_curve(name) for run in described for name in run["curves"]},
        "tables": [table.as_json() for table in report.tables],
        "charts": [chart.as_json() for chart in report.charts],
    }
    parts = {"CSS": _read("page.css"), "JS": "\n".join(map(_read, SCRIPTS))}
    # The browser runs this script alone, whatever text the data may hold.
    code = _read("page.html").split("<script>")[1].split("</script>")[0].replace("/*JS*/", parts["JS"])
    parts["HASH"] = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    page = _read("page.html")
    for name, text in parts.items():
        before, after = page.split(f"/*{name}*/")
        page = before + text + after
    before, after = page.split("/*DATA*/")  # the last one: the data may hold such a mark
    page = before + as_script_text(data) + after
    return page.encode("utf-8", "replace").decode()  # names of files may have halves of characters


def as_script_text(data: Any) -> str:
    """JSON that cannot end the element of a page that holds it. Numbers that are not finite become null."""
    text = json.dumps(_clean(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def describe_run(run: RunRecord, max_positions: int, max_points: int) -> dict[str, Any]:
    """What the page shows of a run: at most ``max_positions`` of a sequence, and ``max_points`` of all its curves."""
    selection, is_cut = _describe_selection(run.snapshots, max_positions)
    notes = [f"The page has the first {max_positions:,} positions of each recorded sequence."] if is_cut else []
    seconds, shares = find_times(run.logs)
    curves = make_curves(run.logs)
    per_curve = max(FEW_POINTS, max_points // max(len(curves), 1))
    return {
        "label": run.label,
        "group": run.group,
        "status": run.status,
        "notes": [*run.notes, *_note_status(run), *notes],
        "sentence": describe_recipe(run.keys),
        "facts": list_facts(run),
        "recipe": "\n".join(f"{key}: {value}" for key, value in run.keys.items()),
        "curves": {curve: thin_out(points, per_curve) for curve, points in curves.items()},
        "time": seconds or shares,
        "time_unit": "s" if seconds else "",
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
    seconds, memory = find_last(logs, "train_seconds"), find_last(logs, "peak_memory_gb")
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
        "time": None if seconds is None else f"{seconds:,.0f} s",
        "peak memory": None if memory is None else f"{memory:.1f} GB",
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _are_numbers(values: Sequence[Any]) -> TypeGuard[Sequence[int]]:
    return all(isinstance(value, int) for value in values)


def _count_steps(run: RunRecord) -> str:
    return f"{run.done:,}" if run.max_steps is None else f"{run.done:,} of {run.max_steps:,}"


def _note_status(run: RunRecord) -> list[str]:
    if run.status == FINISHED:
        return []
    return [f"The run is {run.status}: the page shows it up to step {run.done}."]


def make_curves(logs: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The points of each curve, by the name of the logged number."""
    names = dict.fromkeys(name for log in logs for name in log)
    divergences = [name for name in names if name.endswith("_selected") and name != "entropy_selected"]
    evaluations = [name for name in names if name.startswith("eval_") and not name.endswith(NO_SCORES)]
    curves = {}
    for name in ("loss", *divergences, *CURVES, *evaluations):
        points = [(log["step"], log[name]) for log in logs if isinstance(log.get(name), int | float)]
        if any(value for _, value in points):  # rollouts of the current step have the age 0 all the time
            curves[name] = points
    return curves


def find_times(logs: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """The seconds of each part of a run, which its last log has; and the mean share of each part over the logs."""
    parts = (*PARTS, "other")
    seconds = [(part, find_last(logs, f"{part}_seconds")) for part in parts if find_last(logs, "other_seconds")]
    with_shares = [log for log in logs if any(f"{part}_share" in log for part in PARTS)]
    shares = [(part, [log.get(f"{part}_share", 0.0) for log in with_shares]) for part in PARTS if with_shares]
    means = [(part, sum(values) / len(values)) for part, values in shares]
    return [(part, value) for part, value in seconds if value], [(part, mean) for part, mean in means if mean]


def _describe_selection(snapshots: Sequence[Snapshot], max_positions: int) -> tuple[dict[str, Any] | None, bool]:
    """The snapshots as the selection viewer reads them, None if there are none; and whether a sequence is cut."""
    if not snapshots:
        return None, False
    first = snapshots[0]
    texts = {token: text for snapshot in snapshots for token, text in snapshot.texts.items()}
    samples, shown, is_cut = list[dict[str, Any]](), set[int](), False
    for place, sample in enumerate(first.samples):
        mine = [snapshot.find_rows(place) for snapshot in snapshots]
        columns = [_list_columns(s, rows[:max_positions]) for s, rows in zip(snapshots, mine, strict=True)]
        places = first.columns["position"][mine[0][:max_positions]].tolist()
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
