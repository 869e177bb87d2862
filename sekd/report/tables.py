"""The tables of a report: methods with their scores, mean ± standard deviation over seeds, the best one marked."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sekd.eval.statistics import SeedErrors
from sekd.metric_kinds import MetricKind
from sekd.report.read import Reference, RunRecord, SweepRecord
from sekd.sweep.scores import Column, make_columns, make_log_columns
from sekd.sweep.table import Cell, Line, format_cell, make_cell

NOTE = "Mean ± standard deviation over seeds."
RUNTIME = ("runtime", "per_second")
"""Endings of logged numbers of an evaluation that are no scores."""


@dataclass(frozen=True)
class Text:
    """A cell of a table."""

    text: str
    best: bool = False
    second: bool = False


@dataclass(frozen=True)
class ReportTable:
    """A table with its title, a note below, the names of its columns, and its rows."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[Text]]

    def as_json(self) -> dict[str, Any]:
        """As the page reads it."""
        return asdict(self)

    def as_markdown(self) -> str:
        """As Markdown: the best method is bold, the second underlined."""
        rows = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *([_mark(c) for c in r] for r in self.rows)]
        lines = ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([f"**{self.title}**", "", *lines, "", self.note]) + "\n"

    def as_csv(self) -> str:
        """As CSV."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([cell.text for cell in row] for row in self.rows)
        return file.getvalue()


def _mark(cell: Text) -> str:
    return f"**{cell.text}**" if cell.best else f"<u>{cell.text}</u>" if cell.second else cell.text


def make_tables(
    runs: Sequence[RunRecord], references: Sequence[Reference], sweeps: Sequence[SweepRecord]
) -> list[ReportTable]:
    """All tables that these runs give: of sweeps, of evaluations, and of the last evaluation in each run's log."""
    tables = [_make_sweep_table(sweep) for sweep in sweeps]
    lines = [Line(reference.label, "", {None: place}) for place, reference in enumerate(references)]
    results = [dict(reference.results) for reference in references]
    evaluated = [run for run in runs if run.results]
    if evaluated and not sweeps:
        own = _make_lines(evaluated, len(references))
        columns = make_columns([*results, *(dict(run.results) for run in evaluated)], ["paper", "validation"])
        tables.append(make_table("Evaluations", columns, [*lines, *own]))
    logged = [run for run in runs if any(map(_is_evaluation, run.logs))]
    if logged:
        logs = [_last_evaluation(run) for run in logged]
        columns = [column for column in make_log_columns(logs, "eval_loss") if not column.label.endswith(RUNTIME)]
        tables.append(make_table("Last evaluation in training", columns, _make_lines(logged, 0)))
    return [table for table in tables if len(table.columns) > 1]


def make_table(title: str, columns: Sequence[Column], lines: Sequence[Line]) -> ReportTable:
    """The table of shown scores."""
    shown = sorted((column for column in columns if column.shown), key=lambda column: not column.is_main)
    cells = {column.label: [make_cell(column, line, None) for line in lines] for column in shown}
    kinds = {column.label: column.kind for column in shown}
    return _build(title, NOTE, [line.method for line in lines], [None in line.models for line in lines], kinds, cells)


def _make_sweep_table(sweep: SweepRecord) -> ReportTable:
    content = sweep.content
    kinds = {
        label: MetricKind(kind["higher_is_better"], kind["is_share"], kind["digits"])
        for label, kind in sorted(content.get("columns", {}).items(), key=lambda item: not item[1]["main"])
        if kind["shown"]
    }
    lines = content["lines"]
    cells = {label: [read_cell(line["scores"].get(label)) for line in lines] for label in kinds}
    note = f"{NOTE} In brackets: the difference to {content.get('baseline')} ± its standard error."
    names = [f"{line['method']}, {line['point']}" if line["point"] else line["method"] for line in lines]
    title = content.get("title") or f"Sweep {content.get('sweep')}"
    return _build(title, note, names, [not line["runs"] for line in lines], kinds, cells)


def read_cell(score: Mapping[str, Any] | None) -> Cell | None:
    """A score in the results of a sweep."""
    return None if score is None else Cell(**{**_without_values(score), "errors": SeedErrors(**score["errors"])})


def _without_values(score: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in score.items() if name != "values"}


def _build(
    title: str,
    note: str,
    names: Sequence[str],
    are_references: Sequence[bool],
    kinds: Mapping[str, MetricKind],
    cells: Mapping[str, Sequence[Cell | None]],
) -> ReportTable:
    header = ["method", *(f"{label}{' %' * kind.is_share}{_show_direction(kind)}" for label, kind in kinds.items())]
    rows = [[Text(name)] for name in names]
    for label, kind in kinds.items():
        methods = [None if is_reference else c for is_reference, c in zip(are_references, cells[label], strict=True)]
        best, second = _find_best(kind, methods)
        for row, cell, method in zip(rows, cells[label], methods, strict=True):
            mean = None if method is None else method.mean
            row.append(
                Text(format_cell(kind, cell), mean is not None and mean == best, mean is not None and mean == second)
            )
    return ReportTable(title, note, header, rows)


def _show_direction(kind: MetricKind) -> str:
    return "" if kind.higher_is_better is None else " ↑" if kind.higher_is_better else " ↓"


def _find_best(kind: MetricKind, cells: Sequence[Cell | None]) -> tuple[float | None, float | None]:
    """The best and the second mean; None where nothing can be compared."""
    means = sorted({cell.mean for cell in cells if cell is not None and not math.isnan(cell.mean)})
    if kind.higher_is_better is None or len(means) < 2:
        return None, None
    return (means[-1], means[-2]) if kind.higher_is_better else (means[0], means[1])


def _make_lines(runs: Sequence[RunRecord], first: int) -> list[Line]:
    """A line a group of runs, which stand in the columns from ``first`` on."""
    lines: dict[str, Line] = {}
    for place, run in enumerate(runs):
        models = lines.setdefault(run.group, Line(run.group, "", {})).models
        seed = run.seed if run.seed is not None and run.seed not in models else -1 - place
        models[seed] = first + place
    return [*lines.values()]


def _is_evaluation(log: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval_") for name in log)


def _last_evaluation(run: RunRecord) -> dict[str, float]:
    """The numbers of a run's last evaluation in training."""
    log = next(log for log in reversed(run.logs) if _is_evaluation(log))
    return {name: value for name, value in log.items() if name.startswith("eval_") and isinstance(value, int | float)}
