"""The figures of a report as SVG and PNG files, and its tables as CSV and Markdown."""

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sekd.eval.snapshots import Snapshot
from sekd.files import write_atomically
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
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ValueError("--figures needs matplotlib: pip install 'sekd[report]'") from error
    mpl.use("Agg")
    os.makedirs(folder, exist_ok=True)
    paths = []
    for place, table in enumerate(report.tables):
        for ending, text in (("csv", table.as_csv()), ("md", table.as_markdown())):
            path = os.path.join(folder, f"table_{place + 1}.{ending}")
            write_atomically(path, text)
            paths.append(path)
    figures = {"curves": draw_curves(report.runs)}
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
    import matplotlib.pyplot as plt

    curves = [make_curves(run.logs) for run in runs]
    names = [*dict.fromkeys(name for of_run in curves for name in of_run)]
    groups = [*dict.fromkeys(run.group for run in runs)]
    rows = max(1, -(-len(names) // COLUMNS))
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(4.2 * COLUMNS, 2.7 * rows), squeeze=False, layout="constrained")
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


def draw_selection(title: str, snapshots: Sequence[Snapshot]) -> "Figure":
    """The first sequence at the first and at the last snapshot: each token coloured by the student's entropy at the
    position that predicts it, and chosen positions outlined."""
    import matplotlib.pyplot as plt

    shown = [snapshots[0], snapshots[-1]] if len(snapshots) > 1 else [snapshots[0]]
    lines = [_lay_out(snapshot) for snapshot in shown]
    heights = [max(row for row, *_ in cells) + 1 for cells in lines]
    highest = max((value for cells in lines for *_, value, _ in cells if value is not None), default=1.0) or 1.0
    figure, axes = plt.subplots(
        len(shown),
        1,
        figsize=(9.2, 0.9 + 0.26 * sum(heights) + 0.5 * len(shown)),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    colours = plt.get_cmap("YlGnBu")
    for axis, cells, snapshot, height in zip(axes[:, 0], lines, shown, heights, strict=True):
        for row, start, text, value, is_chosen in cells:
            _draw_token(axis, row, start, text, None if value is None else colours(0.75 * value / highest), is_chosen)
        axis.set(xlim=(-0.5, LINE_LENGTH + 0.5), ylim=(height, -0.4))
        axis.set_axis_off()
        axis.set_title(f"{_as_label(title)}, after {snapshot.step} steps", fontsize=10, loc="left")
    scale = plt.cm.ScalarMappable(cmap=colours, norm=plt.Normalize(0, highest / 0.75))
    bar = figure.colorbar(scale, ax=axes[:, 0], orientation="horizontal", shrink=0.3, aspect=30, pad=0.02)
    bar.ax.set_xlim(0, highest)
    bar.set_label("student entropy (nats); chosen positions are outlined", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _lay_out(snapshot: Snapshot) -> list[tuple[int, int, str, float | None, bool]]:
    """The tokens of the first sequence in lines: row, column, text, entropy (None if nothing predicts it), chosen."""
    rows = snapshot.columns["sample"] == 0
    places = [position + 1 for position in snapshot.columns["position"][rows].tolist()]
    entropies = dict(zip(places, snapshot.columns["student_entropy"][rows].tolist(), strict=True))
    weights = dict(zip(places, snapshot.columns["weight"][rows].tolist(), strict=True))
    cells, row, column = list[tuple[int, int, str, float | None, bool]](), 0, 0
    for place, token in enumerate(snapshot.samples[0]["input_ids"]):
        text = escape_controls(snapshot.texts[token].replace("\n", "↵")) or "∅"
        if column + len(text) > LINE_LENGTH and column:
            row, column = row + 1, 0
        if row >= LINES:
            break
        cells.append((row, column, text[:LINE_LENGTH], entropies.get(place), weights.get(place, 0) > 0))
        column += len(text)
        if "\n" in snapshot.texts[token]:
            row, column = row + 1, 0
    return cells


def _draw_token(axis: "Axes", row: int, start: int, text: str, colour: Any, is_chosen: bool) -> None:
    import matplotlib.pyplot as plt

    box = plt.Rectangle((start + 0.05, row - 0.38), len(text) - 0.1, 0.8, facecolor=colour or "none")
    box.set(edgecolor="#111111" if is_chosen else "none", linewidth=1.1)
    axis.add_patch(box)
    font: Any = {"ha": "center", "va": "center", "family": "monospace", "fontsize": 8.5}
    for place, character in enumerate(text):
        shown = character.replace("$", r"\$")
        axis.text(start + place + 0.5, row, shown, color="#777777" if colour is None else "#111111", **font)


def _as_label(text: str) -> str:
    """Text that matplotlib takes as it is: no mathematics, and no leading underscore."""
    return escape_controls(text).replace("$", r"\$").lstrip("_")
