"""The figures of a report as SVG and PNG files, and its tables as CSV and Markdown."""

import importlib.util
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sekd.eval.snapshots import Snapshot
from sekd.files import write_atomically
from sekd.report.charts import Chart
from sekd.report.names import name_curve
from sekd.report.page import Report, make_curves
from sekd.report.read import RunRecord
from sekd.tables import escape_controls

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f5fa8", "#c2571a", "#3d7f4f", "#7a4b9a", "#a8323e", "#6b6b6b")
COLUMNS = 3
"""Curves beside each other."""
LINE_LENGTH, LINES = 84, 14
"""The characters of a line, and the most lines, of the picture of a selection."""


def write_figures(report: Report, folder: str) -> list[str]:
    """Write everything into a folder, and return the paths.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--figures needs matplotlib: pip install 'sekd[report]'")
    os.makedirs(folder, exist_ok=True)
    paths = []
    for place, table in enumerate(report.tables):
        for ending, text in (("csv", table.as_csv()), ("md", table.as_markdown())):
            path = os.path.join(folder, f"table_{place + 1}.{ending}")
            write_atomically(path, text)
            paths.append(path)
    figures = {"curves": draw_curves(report.runs)}
    figures |= {f"chart_{place + 1}": draw_chart(chart) for place, chart in enumerate(report.charts)}
    for place, run in enumerate(report.runs):
        if run.snapshots:
            figures[f"selection_{place + 1}"] = draw_selection(run.label, run.snapshots)
    for name, figure in figures.items():
        for ending in ("svg", "png"):
            path = os.path.join(folder, f"{name}.{ending}")
            figure.savefig(path, dpi=150)
            paths.append(path)
    return paths


def draw_curves(runs: Sequence[RunRecord]) -> "Figure":
    """A panel a logged number, a line a group of runs, with a band from the lowest to the highest seed."""
    from matplotlib.figure import Figure

    curves = [make_curves(run.logs) for run in runs]
    names = [*dict.fromkeys(name for of_run in curves for name in of_run)]
    groups = [*dict.fromkeys(run.group for run in runs)]
    rows = max(1, -(-len(names) // COLUMNS))
    figure = Figure((4.2 * COLUMNS, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        title, unit = name_curve(name)
        for place, group in enumerate(groups):
            lines = [dict(c[name]) for run, c in zip(runs, curves, strict=True) if run.group == group and name in c]
            _draw_band(axis, lines, COLOURS[place % len(COLOURS)], 100.0 if unit == "%" else 1.0, group)
        axis.set_title(f"{title} ({unit})" if unit else title, fontsize=10, loc="left")
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if labels:
        figure.legend(
            handles, [_as_label(label) for label in labels], loc="outside lower center", ncols=3, frameon=False
        )
    return figure


def _draw_band(axis: "Axes", lines: Sequence[Mapping[int, float]], colour: str, factor: float, label: str) -> None:
    steps = sorted({step for line in lines for step in line})
    values = [[factor * line[step] for line in lines if step in line] for step in steps]
    means = [statistics.fmean(of_step) for of_step in values]
    axis.plot(steps, means, color=colour, lw=1.4, label=label, marker="o" if len(steps) == 1 else None)
    if len(lines) > 1:
        axis.fill_between(steps, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.18, lw=0)


def draw_chart(chart: Chart) -> "Figure":
    """A chart of several runs."""
    from matplotlib.figure import Figure

    figure = Figure((7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    for place, line in enumerate(chart.lines):
        colour, marker = COLOURS[place % len(COLOURS)], "o" if chart.is_discrete else None
        xs, ys, low, high = zip(*line.points, strict=True)
        axis.plot(xs, ys, color=colour, lw=1.4, marker=marker, label=_as_label(line.label))
        axis.fill_between(xs, low, high, color=colour, alpha=0.18, lw=0)
    if chart.is_discrete:
        shares = sorted({point[0] for line in chart.lines for point in line.points})
        axis.set_xscale("log")
        axis.set_xticks(shares, [f"{share:g}" for share in shares])
        axis.minorticks_off()
    axis.set_title(f"{_as_label(chart.title)} ({chart.unit})" if chart.unit else _as_label(chart.title), loc="left")
    axis.set_xlabel(chart.x_name)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure


@dataclass(frozen=True)
class _Token:
    """A token in the picture of a selection.

    Attributes:
        row, column: where its first character stands.
        entropy: of the student where it predicts the token; None if it does not.
    """

    row: int
    column: int
    text: str
    entropy: float | None
    is_chosen: bool


def draw_selection(title: str, snapshots: Sequence[Snapshot]) -> "Figure":
    """The first sequence at the first and at the last snapshot.

    Each token has the colour of the student's entropy at the position that predicts it. Chosen positions are outlined.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    shown = [snapshots[0], snapshots[-1]] if len(snapshots) > 1 else [snapshots[0]]
    pages = [_lay_out(snapshot) for snapshot in shown]
    heights = [max(token.row for token in tokens) + 1 for tokens in pages]
    entropies = [token.entropy for tokens in pages for token in tokens if token.entropy is not None]
    highest = max(entropies, default=1.0) or 1.0
    figure = Figure((9.2, 0.9 + 0.26 * sum(heights) + 0.5 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    scale: Any = ScalarMappable(Normalize(0, highest / 0.75), colormaps["YlGnBu"])  # its end is too dark for letters
    for axis, tokens, snapshot, height in zip(axes, pages, shown, heights, strict=True):
        for token in tokens:
            _draw_token(axis, token, None if token.entropy is None else scale.to_rgba(token.entropy))
        axis.set(xlim=(-0.5, LINE_LENGTH + 0.5), ylim=(height, -0.4))
        axis.set_axis_off()
        axis.set_title(f"{_as_label(title)}, after {snapshot.step} steps", fontsize=10, loc="left")
    bar = figure.colorbar(scale, ax=axes, orientation="horizontal", shrink=0.3, aspect=30, pad=0.02)
    bar.ax.set_xlim(0, highest)
    bar.set_label("student entropy (nats); chosen positions are outlined", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _lay_out(snapshot: Snapshot) -> list[_Token]:
    """The tokens of the first sequence, in lines."""
    rows = snapshot.find_rows(0)
    places = [position + 1 for position in snapshot.columns["position"][rows].tolist()]
    entropies = dict(zip(places, snapshot.columns["student_entropy"][rows].tolist(), strict=True))
    weights = dict(zip(places, snapshot.columns["weight"][rows].tolist(), strict=True))
    tokens, row, column = list[_Token](), 0, 0
    for place, token in enumerate(snapshot.samples[0]["input_ids"]):
        text = escape_controls(snapshot.get_text(token).replace("\n", "↵"))[:LINE_LENGTH] or "∅"
        if column + len(text) > LINE_LENGTH and column:
            row, column = row + 1, 0
        if row >= LINES:
            break
        tokens.append(_Token(row, column, text, entropies.get(place), weights.get(place, 0) > 0))
        column += len(text)
        if text.endswith("↵"):
            row, column = row + 1, 0
    return tokens


def _draw_token(axis: "Axes", token: _Token, colour: Any) -> None:
    from matplotlib.patches import Rectangle

    box = Rectangle((token.column + 0.05, token.row - 0.38), len(token.text) - 0.1, 0.8, facecolor=colour or "none")
    box.set(edgecolor="#111111" if token.is_chosen else "none", linewidth=1.1)
    axis.add_patch(box)
    font: Any = {"ha": "center", "va": "center", "family": "monospace", "fontsize": 8.5}
    for place, character in enumerate(token.text):
        shown = character.replace("$", r"\$")
        axis.text(token.column + place + 0.5, token.row, shown, color="#111111" if colour else "#777777", **font)


def _as_label(text: str) -> str:
    """Text that matplotlib takes as it is: no mathematics, and no leading underscore."""
    return escape_controls(text).replace("$", r"\$").lstrip("_")
