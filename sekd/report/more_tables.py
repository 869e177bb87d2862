"""Tables of what several runs show together: budgets, chosen samples, caches, and the time of phases."""

import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sekd.cache.store import Store, read_manifest
from sekd.files import DamagedFile, read_checked
from sekd.metric_kinds import MetricKind
from sekd.report.read import RunRecord, SweepRecord, find_last
from sekd.report.tables import ReportTable, TableCell
from sekd.sweep.table import Cell, format_cell

SHARE = re.compile(r"\s*\d+(\.\d+)?\s*%")
"""A budget in the name of a method."""


def make_more_tables(runs: Sequence[RunRecord], sweeps: Sequence[SweepRecord]) -> list[ReportTable]:
    """The tables that these runs give, perhaps none."""
    tables = [_make_budgets(sweep, runs) for sweep in sweeps]
    tables += [_make_overlaps(runs), _make_caches(runs), _make_phases(runs)]
    return [table for table in tables if table is not None]


@dataclass(frozen=True)
class Budgets:
    """The main score of methods at several shares of the positions.

    Attributes:
        score: its label.
        kind: of the score.
        families: methods without their share -> share -> mean and deviation over seeds.
        baseline: the sweep's baseline and its cell; None without one.
    """

    score: str
    kind: MetricKind
    families: Mapping[str, Mapping[float, Cell]]
    baseline: tuple[str, Cell] | None


def find_budgets(sweep: SweepRecord, runs: Sequence[RunRecord]) -> Budgets | None:
    """The budgets of a sweep; None if no method has two."""
    if sweep.main is None:
        return None
    fractions = {run.folder: run.keys.get("position_fraction") for run in runs}
    families: dict[str, dict[float, Cell]] = {}
    for line in sweep.lines:
        paths = [os.path.join(sweep.folder, name) for name in line.folders]
        fraction = next((fractions[path] for path in paths if path in fractions), None)
        cell = line.cells.get(sweep.main)
        if cell is None or math.isnan(cell.mean):
            continue
        if isinstance(fraction, int | float) and SHARE.search(line.method):
            families.setdefault(SHARE.sub("", line.method), {})[fraction] = cell
    families = {name: cells for name, cells in families.items() if len(cells) > 1}
    if not families:
        return None
    cells = (line.cells.get(sweep.main) for line in sweep.lines if line.method == sweep.baseline)
    baseline = next(((str(sweep.baseline), c) for c in cells if c is not None and not math.isnan(c.mean)), None)
    return Budgets(sweep.main, sweep.kinds[sweep.main], families, baseline)


def _make_budgets(sweep: SweepRecord, runs: Sequence[RunRecord]) -> ReportTable | None:
    """A method in a row, a share of the positions in a column (arXiv 2602.01395, figures 2 and 3)."""
    budgets = find_budgets(sweep, runs)
    if budgets is None:
        return None
    shares = sorted({share for cells in budgets.families.values() for share in cells})
    rows = [
        [TableCell(name), *(TableCell(format_cell(budgets.kind, cells.get(share))) for share in shares)]
        for name, cells in budgets.families.items()
    ]
    note = "Mean ± standard deviation over seeds, and the difference to the baseline in brackets."
    title = f"{budgets.score} by share of the positions"
    return ReportTable(title, note, ["method", *(f"{100 * share:g} %" for share in shares)], rows)


def _make_overlaps(runs: Sequence[RunRecord]) -> ReportTable | None:
    """Which samples do scores agree on (arXiv 2602.01395, figure 7)?"""
    choices = {run.group: choice for run in runs if (choice := _read_choice(run)) is not None}
    kept = {group: {*choice["kept"]} for group, choice in choices.items()}
    if len(kept) < 2:
        return None
    smaller = {(a, b): max(1, min(len(kept[a]), len(kept[b]))) for a in kept for b in kept}
    rows = [[TableCell(a), *(TableCell(f"{len(kept[a] & kept[b]) / smaller[a, b]:.0%}") for b in kept)] for a in kept]
    return ReportTable("Samples that both runs keep", "Of the samples of the smaller choice.", ["", *kept], rows)


def _read_choice(run: RunRecord) -> Mapping[str, Any] | None:
    """The samples file of a run; None if there is none that can be read."""
    path = run.keys.get("samples_file") or os.path.join(run.folder, "samples.json")
    try:
        choice = read_checked(path)
    except (OSError, DamagedFile, TypeError):
        return None
    return choice if isinstance(choice.get("kept"), list) else None


def _make_caches(runs: Sequence[RunRecord]) -> ReportTable | None:
    """What the caches of the runs take on disk (arXiv 2602.01395, table 6)."""
    rows = list[list[TableCell]]()
    for folder in dict.fromkeys(str(run.keys["teacher_cache"]) for run in runs if run.keys.get("teacher_cache")):
        try:
            store = Store(folder)
        except (OSError, ValueError):
            continue
        positions, size, classes = (store.total(name) for name in ("rows", "bytes", "classes"))
        logits = 2 * store.fingerprint["vocab"]
        rows.append(
            [
                TableCell(folder),
                TableCell(f"{store.total('samples'):,}"),
                TableCell(f"{positions:,}"),
                TableCell(f"{size / 1e6:,.2f}"),
                TableCell(f"{size / max(positions, 1):.1f}"),
                TableCell(f"{classes / max(positions, 1):.1f}"),
                TableCell(f"{logits:,}"),
            ]
        )
    header = ["cache", "samples", "positions", "MB", "bytes a position", "classes a position", "bytes of fp16 logits"]
    note = "fp16 logits: 2 bytes a class of the vocabulary."
    return ReportTable("Teacher caches", note, header, rows) if rows else None


PHASES = "scoring samples", "building the cache", "training"


def _make_phases(runs: Sequence[RunRecord]) -> ReportTable | None:
    """The seconds of what comes before the training, and of it (arXiv 2602.01395, table 7)."""
    groups: dict[str, list[list[float | None]]] = {}
    for run in runs:
        choice = _read_choice(run) or {}
        seconds = [choice.get("seconds"), _read_build_seconds(run), find_last(run.logs, "train_seconds")]
        groups.setdefault(run.group, []).append([s if isinstance(s, int | float) else None for s in seconds])
    means = {group: [_mean(column) for column in zip(*rows, strict=True)] for group, rows in groups.items()}
    if not any(scoring or building for scoring, building, _ in means.values()):
        return None
    rows = []
    for group, phases in means.items():
        known = [seconds for seconds in phases if seconds is not None]
        if known:
            cells = ["" if seconds is None else f"{seconds:,.1f}" for seconds in (*phases, sum(known))]
            rows.append([TableCell(group), *map(TableCell, cells)])
    note = "Seconds, without the loading of models. Scores and a cache are made once, for all runs that read them."
    return ReportTable("Time of phases", note, ["method", *(f"{phase}, s" for phase in PHASES), "in all, s"], rows)


def _read_build_seconds(run: RunRecord) -> float | None:
    folder = run.keys.get("teacher_cache")
    try:
        return None if folder is None else read_manifest(str(folder)).get("seconds")
    except (OSError, ValueError):
        return None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
