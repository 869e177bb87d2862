"""The table of a sweep: mean ± standard deviation over seeds, and paired differences to the baseline."""

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from sekd.eval.compare import LARGEST
from sekd.eval.statistics import SeedErrors, find_seed_errors
from sekd.files import write_atomically
from sekd.metric_kinds import MetricKind
from sekd.sweep.scores import Column
from sekd.tables import escape_controls, print_table

NOTES = (
    "mean ± standard deviation over seeds",
    "in brackets: the difference to {baseline}, paired by {pairs}, ± its standard error over {pairs}",
)


NO_ERRORS = SeedErrors(None, None, None)


@dataclass(frozen=True)
class Line:
    """A method at one point of its grid, or a reference.

    Attributes:
        method: its name, or the reference's.
        place: the point as text; empty without a grid.
        models: the places of its models in the columns, by seed; a reference has the seed None.
        folders: the names of its runs' folders, by seed.
    """

    method: str
    place: str
    models: dict[int | None, int]
    folders: dict[int | None, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A score of a line.

    Attributes:
        mean: over the seeds that have it.
        deviation: the standard deviation over them; None for one seed.
        seeds: how many they are.
        difference: the mean difference to the baseline, over the seeds of both; None if there is none.
        errors: the standard errors of the difference.
    """

    mean: float
    deviation: float | None
    seeds: int
    difference: float | None = None
    errors: SeedErrors = NO_ERRORS


def make_cell(column: Column, line: Line, baseline: Line | None) -> Cell | None:
    """A score of a line, and its difference to the baseline's line; None if no model of the line has it.

    Without a baseline there is no difference. Differences are on the items of all models, where the score has items.
    """
    values = [value for model in line.models.values() if (value := column.values[model]) is not None]
    if not values:
        return None
    deviation = None
    if len(values) > 1:
        deviation = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
    cell = Cell(math.fsum(values) / len(values), deviation, len(values))
    if baseline is None or baseline is line or not column.is_compared:
        return cell
    pairs = [(line.models[seed], baseline.models[seed]) for seed in line.models if seed in baseline.models]
    paired = [(column.paired[a], column.paired[b]) for a, b in pairs]
    items = [(a.value - b.value, a.deviations - b.deviations) for a, b in paired if a is not None and b is not None]
    if items:
        differences, deviations = [value for value, _ in items], np.stack([deviations for _, deviations in items])
        errors = find_seed_errors(np.array(differences), deviations)
    else:
        both = [(column.values[a], column.values[b]) for a, b in pairs]
        differences = [a - b for a, b in both if a is not None and b is not None]
        if not differences:
            return cell
        errors = find_seed_errors(np.array(differences), None)
    mean = math.fsum(differences) / len(differences)
    return Cell(cell.mean, cell.deviation, cell.seeds, mean, errors)


def choose_places(lines: Sequence[Line], column: Column, better_is_higher: bool) -> dict[str, str]:
    """The best point of each method: by the mean of a score over its seeds.

    Points with fewer finished seeds than another point of the method are not chosen. The first of equal points is.
    """
    best: dict[str, tuple[tuple[int, float], str]] = {}
    for line in lines:
        cell = make_cell(column, line, None)
        if cell is None or math.isnan(cell.mean):
            continue
        rank = cell.seeds, cell.mean if better_is_higher else -cell.mean
        if line.method not in best or rank > best[line.method][0]:
            best[line.method] = rank, line.place
    return {method: place for method, (_, place) in best.items()}


def format_cell(kind: MetricKind, cell: Cell | None) -> str:
    """A score as text, such as ``43.5 ± 1.1 (+0.8 ± 0.4)``."""
    if cell is None:
        return "-"
    text = _format(kind, cell.mean, cell.deviation)
    return text if cell.difference is None else f"{text} ({_format(kind, cell.difference, cell.errors.total, '+')})"


def _format(kind: MetricKind, value: float, spread: float | None, sign: str = "") -> str:
    factor = 100.0 if kind.is_share else 1.0
    form = f".{kind.digits}f" if abs(factor * value) < LARGEST else ".3g"
    text = f"{factor * value:{sign}{form}}"
    return text if spread is None else f"{text} ± {factor * spread:{form}}"


def make_rows(columns: Sequence[Column], lines: Sequence[Line], baseline: Line | None) -> list[list[str]]:
    """The header and the rows of the table of shown scores, as texts. Main scores come first."""
    shown = sorted((column for column in columns if column.shown), key=lambda column: not column.is_main)
    places = [line.place for line in lines if line.place]
    keys = {place.rpartition(" ")[0] for place in places}
    key = keys.pop() if len(keys) == 1 else ""
    key = "" if "," in key else key  # of a grid of one key, the cells have the values alone
    header = ["method", *[key or "point"] * bool(places), "seeds"]
    for column in shown:
        header.append(column.label + " %" * column.kind.is_share + " ↓" * (column.kind.higher_is_better is False))
    rows = [header]
    for line in lines:
        number = "" if None in line.models else str(len(line.models))
        row = [line.method, *[line.place.removeprefix(f"{key} ")] * bool(places), number]
        compared = None if None in line.models else baseline
        rows.append(row + [format_cell(column.kind, make_cell(column, line, compared)) for column in shown])
    return rows


def show_rows(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    """Print a table, with a difference below its score. Columns that a window has no room for are left out."""
    texts = [[escape_controls(cell).replace(" (", "\n(") for cell in row] for row in rows]
    widths = [
        3 + max(len(part) for row in texts for part in _split_cell(row[i], row is texts[0]))
        for i in range(len(texts[0]))
    ]
    console, number = Console(), len(widths)
    if console.is_terminal:
        while sum(widths[:number]) >= console.width and number > rows[0].index("seeds") + 2:
            number -= 1
    table = Table()
    for place, name in enumerate(texts[0][:number]):
        justify: Literal["left", "right"] = "left" if place == 0 else "right"
        table.add_column(name, overflow="fold", justify=justify, width=widths[place] - 3)
    for row in texts[1:]:
        table.add_row(*row[:number])
    print_table(table, console.width if console.is_terminal else sum(widths) + 1)
    if number < len(widths):
        print(f"the window has room for {number} of {len(widths)} columns; table.md has all")
    for note in notes:
        print(escape_controls(note))


def _split_cell(text: str, is_header: bool) -> list[str]:
    """The parts of a cell that stay on one line."""
    return text.split() if is_header else text.split("\n")


def as_markdown(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """A table in Markdown, with notes below."""
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([*table, "", *(f"- {note}" for note in notes)]) + "\n"


def as_csv(columns: Sequence[Column], lines: Sequence[Line], baseline: Line | None) -> str:
    """A line a method and score, of all scores, in their own units: accuracies are shares."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = ("method", "point", "score", "mean", "standard_deviation", "seeds", "higher_is_better")
    writer.writerow([*names, "difference", "difference_stderr", "stderr_over_seeds", "stderr_over_items"])
    for line in lines:
        for column in columns:
            cell = make_cell(column, line, None if None in line.models else baseline)
            if cell is not None:
                numbers = [cell.mean, cell.deviation, cell.seeds, column.kind.higher_is_better, cell.difference]
                errors = [cell.errors.total, cell.errors.seeds, cell.errors.items]
                writer.writerow([line.method, line.place, column.label, *numbers, *errors])
    return file.getvalue()


def write_table(
    folder: str,
    columns: Sequence[Column],
    lines: Sequence[Line],
    baseline: Line | None,
    notes: Sequence[str],
    facts: Mapping[str, Any],
) -> None:
    """Print the table, and write table.md, table.csv and results.json."""
    rows = make_rows(columns, lines, baseline)
    show_rows(rows, notes)
    write_atomically(os.path.join(folder, "table.md"), as_markdown(rows, notes))
    write_atomically(os.path.join(folder, "table.csv"), as_csv(columns, lines, baseline))
    write_results(folder, columns, lines, baseline, facts)


def write_results(
    folder: str, columns: Sequence[Column], lines: Sequence[Line], baseline: Line | None, facts: Mapping[str, Any]
) -> None:
    """Write results.json, from which `sekd report` makes its table: the value of each seed, and ``facts``."""
    content = []
    for line in lines:
        scores = {}
        for column in columns:
            if (cell := make_cell(column, line, None if None in line.models else baseline)) is not None:
                by_seed = {str(seed): column.values[model] for seed, model in line.models.items()}
                scores[column.label] = {**asdict(cell), "values": by_seed}
        content.append({"method": line.method, "point": line.place, "runs": line.folders, "scores": scores})
    kinds = {column.label: {**asdict(column.kind), "shown": column.shown, "main": column.is_main} for column in columns}
    text = json.dumps({**facts, "columns": kinds, "lines": content}, indent=2)
    write_atomically(os.path.join(folder, "results.json"), text + "\n")
