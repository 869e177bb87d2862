"""The tables of a report: methods with their scores, mean ± standard deviation over seeds, the best one marked."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sekd.eval.records import TaskResult
from sekd.eval.tasks import SUITES
from sekd.metric_kinds import MetricKind
from sekd.report.names import NO_SCORES
from sekd.report.read import Reference, RunRecord, SweepRecord
from sekd.sweep.scores import Column, find_parts, make_columns, make_log_columns
from sekd.sweep.table import Cell, Line, format_cell, make_cell

NOTE = "Mean ± standard deviation over seeds."


@dataclass(frozen=True)
class TableCell:
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
    rows: list[list[TableCell]]

    def as_json(self) -> dict[str, Any]:
        """As the page reads it."""
        return asdict(self)

    def as_markdown(self) -> str:
        """As Markdown: the best method is bold, the second underlined."""
        rows = [
            self.columns,
            ["---", *["---:"] * (len(self.columns) - 1)],
            *([_mark_rank(c) for c in r] for r in self.rows),
        ]
        lines = ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([f"**{self.title}**", "", *lines, "", self.note]) + "\n"

    def as_csv(self) -> str:
        """As CSV."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([cell.text for cell in row] for row in self.rows)
        return file.getvalue()


def _mark_rank(cell: TableCell) -> str:
    return f"**{cell.text}**" if cell.best else f"<u>{cell.text}</u>" if cell.second else cell.text


def make_tables(
    runs: Sequence[RunRecord], references: Sequence[Reference], sweeps: Sequence[SweepRecord], notes: list[str]
) -> list[ReportTable]:
    """All tables that these runs give: of sweeps, of evaluations, and of the last evaluation in each run's log.

    ``notes`` gets a sentence about what cannot be compared.
    """
    tables = [_make_sweep_table(sweep) for sweep in sweeps]
    evaluated = [run for run in runs if run.results and not run.in_sweep]
    if evaluated:
        lines = [Line(reference.label, "", {None: place}) for place, reference in enumerate(references)]
        lines += _make_lines(evaluated, len(references))
        everything = [*(model.results for model in references), *(run.results for run in evaluated)]
        results = _leave_out_unequal(everything, notes)
        tables.append(make_table("Evaluations", make_columns(results, _find_suites(results)), lines))
    logged = [run for run in runs if any(map(_is_evaluation, run.logs))]
    if logged:
        columns = make_log_columns([_last_evaluation(run) for run in logged], "eval_loss")
        columns = [column for column in columns if not column.label.endswith(NO_SCORES)]
        tables.append(make_table("Last evaluation in training", columns, _make_lines(logged, 0)))
    return [table for table in tables if len(table.columns) > 1]


def _leave_out_unequal(results: Sequence[Mapping[str, TaskResult]], notes: list[str]) -> list[dict[str, TaskResult]]:
    """The results of each model, without tasks that the models were evaluated on with different settings."""
    left_out = set[str]()
    for name in dict.fromkeys(name for of_model in results for name in of_model):
        settings = [of_model[name].settings for of_model in results if name in of_model]
        if any(other != settings[0] for other in settings):
            left_out.add(name)
            notes.append(f"The scores of {name} are left out: its settings differ between the models.")
    return [{name: result for name, result in of_model.items() if name not in left_out} for of_model in results]


def _find_suites(results: Sequence[Mapping[str, TaskResult]]) -> list[str]:
    """The suites that were evaluated whole: their means stand for their tasks."""
    return [
        name
        for name, suite in SUITES.items()
        if all(find_parts(results, name, parts) is not None for parts in suite.means.values())
    ]


def make_table(title: str, columns: Sequence[Column], lines: Sequence[Line]) -> ReportTable:
    """The table of shown scores."""
    shown = sorted((column for column in columns if column.shown), key=lambda column: not column.is_main)
    cells = {column.label: [make_cell(column, line, None) for line in lines] for column in shown}
    kinds = {column.label: column.kind for column in shown}
    return _build_table(
        title, NOTE, [line.method for line in lines], [None in line.models for line in lines], kinds, cells
    )


def _make_sweep_table(sweep: SweepRecord) -> ReportTable:
    cells = {label: [line.cells.get(label) for line in sweep.lines] for label in sweep.kinds}
    has_differences = any(cell and cell.difference is not None for column in cells.values() for cell in column)
    more = f" In brackets: the difference to {sweep.baseline} ± its standard error." if has_differences else ""
    names = [f"{line.method}, {line.point}" if line.point else line.method for line in sweep.lines]
    are_references = [not line.folders for line in sweep.lines]
    return _build_table(sweep.title, NOTE + more, names, are_references, sweep.kinds, cells)


def _build_table(
    title: str,
    note: str,
    names: Sequence[str],
    are_references: Sequence[bool],
    kinds: Mapping[str, MetricKind],
    cells: Mapping[str, Sequence[Cell | None]],
) -> ReportTable:
    header = ["method", *(f"{label}{' %' * kind.is_share}{_show_direction(kind)}" for label, kind in kinds.items())]
    rows = [[TableCell(name)] for name in names]
    for label, kind in kinds.items():
        methods = [None if is_reference else c for is_reference, c in zip(are_references, cells[label], strict=True)]
        best, second = _find_best(kind, methods)
        for row, cell, method in zip(rows, cells[label], methods, strict=True):
            mean = math.nan if method is None else method.mean
            row.append(TableCell(format_cell(kind, cell), mean == best, mean == second))
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
