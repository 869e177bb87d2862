"""The charts of several runs together: scores by budget, and memory over a few steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sekd.report.more_tables import Budgets, find_budgets
from sekd.report.read import RunRecord, SweepRecord
from sekd.sweep.table import Cell

MEMORY_POINTS = 1000
"""About the points of a run's memory in the page."""


@dataclass(frozen=True)
class ChartLine:
    """A line of a chart. A point has x, y, and the ends of the band around y, which may be y."""

    label: str
    points: list[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart of several runs.

    Attributes:
        section: of the page: "tables" or "time".
        title: above it.
        note: below it.
        unit: of y.
        x_name: what x is, as it follows a number.
        is_discrete: x has a few values, which are drawn by their logarithms.
        lines: one a method or run.
    """

    section: str
    title: str
    note: str
    unit: str
    x_name: str
    is_discrete: bool
    lines: list[ChartLine]

    def as_json(self) -> dict[str, Any]:
        """As the page reads it."""
        return asdict(self)


def make_charts(runs: Sequence[RunRecord], sweeps: Sequence[SweepRecord]) -> list[Chart]:
    """The charts that these runs give, perhaps none."""
    budgets = [some for sweep in sweeps if (some := find_budgets(sweep, runs)) is not None]
    return [*map(_chart_budgets, budgets), *_chart_memory(runs)]


def _chart_budgets(budgets: Budgets) -> Chart:
    """A line a method, over the share of the positions (arXiv 2602.01395, figures 2 and 3)."""
    families = dict(budgets.families)
    shares = {share for cells in families.values() for share in cells}
    if budgets.baseline is not None:  # a flat line
        name, cell = budgets.baseline
        families[name] = {min(shares): cell, max(shares): cell}
    is_share = budgets.kind.is_share
    lines = [
        ChartLine(name, [_as_point(share, cells[share], 100.0 if is_share else 1.0) for share in sorted(cells)])
        for name, cells in families.items()
    ]
    note = "Over the share of the positions, on a logarithmic scale. The band is ± the standard deviation over seeds."
    if budgets.baseline is not None:
        note += f" {budgets.baseline[0]} is the same at every share."
    title = f"{budgets.score} by share of the positions"
    return Chart("tables", title, note, "%" if is_share else "", "% of the positions", True, lines)


def _as_point(share: float, cell: Cell, factor: float) -> tuple[float, float, float, float]:
    is_known = cell.deviation is not None and math.isfinite(cell.deviation)
    mean, spread = factor * cell.mean, factor * (cell.deviation or 0.0) if is_known else 0.0
    return 100 * share, mean, mean - spread, mean + spread


def _chart_memory(runs: Sequence[RunRecord]) -> list[Chart]:
    """A line a profiled run, over the seconds (arXiv 2602.01395, figure 8)."""
    profiled: Mapping[str, RunRecord] = {run.group: run for run in reversed(runs) if run.memory}
    if not profiled:
        return []
    highest = max(size for run in profiled.values() for _, size in run.memory)
    unit, size = ("GB", 1e9) if highest >= 1e9 else ("MB", 1e6)
    lines = []
    for group in dict.fromkeys(run.group for run in runs):
        if group in profiled:
            points = thin_out(profiled[group].memory, MEMORY_POINTS)
            lines.append(ChartLine(group, [(x, y / size, y / size, y / size) for x, y in points]))
    note = (
        "Over the seconds of the recorded steps (profile: N): memory that PyTorch took since they began, and still "
        "holds. The models are not in it."
    )
    return [Chart("time", "Memory of a step", note, unit, "s", False, lines)]


def thin_out(points: Sequence[tuple[float, float]], number: int) -> list[tuple[float, float]]:
    """About ``number`` points: the first and the last, and of each part of the curve the lowest and the highest."""
    if len(points) <= number:
        return [*points]
    size = math.ceil(2 * len(points) / number)
    kept = {points[0], points[-1]}
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept |= {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
    return sorted(kept)
