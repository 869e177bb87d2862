"""A run in the terminal, while it trains or later: its progress, its curves, and the positions that it chooses."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.style import Style
from rich.table import Table
from rich.text import Text

from sekd.eval.snapshots import Snapshot
from sekd.report.names import name_curve
from sekd.report.page import describe_recipe, make_curves
from sekd.report.read import RUNNING, RunRecord, find_last, read_run
from sekd.tables import escape_controls

BLOCKS = "▁▂▃▄▅▆▇█"
CURVES = 8
"""The curves that are shown, at most."""
ROLLOUTS = 2
TAIL = 1 << 18
"""Bytes of the end of a file of rollouts that are read."""
TOKENS = 160
"""The tokens of the selection that are shown."""


def watch(folder: str, seconds: float, console: Console | None = None) -> None:
    """Show a run until it no longer trains. What is not a terminal gets the view once.

    Args:
        folder: the run's ``output_dir``.
        seconds: between two looks.
    """
    console = console or Console()
    run = read_run(folder, None)
    if not console.is_terminal:
        console.print(make_view(run))
        return
    with Live(make_view(run), console=console, refresh_per_second=2) as live:
        while run.status == RUNNING:
            time.sleep(seconds)
            run = read_run(folder, None)
            live.update(make_view(run))


def make_view(run: RunRecord) -> RenderableType:
    """All that is known of a run."""
    parts: list[RenderableType] = [_make_head(run)]
    if curves := make_curves(run.logs):
        parts.append(_make_curves(curves))
    if rollouts := _read_rollouts(run.folder):
        parts.append(_make_rollouts(rollouts))
    if run.snapshots:
        parts.append(_make_selection(run.snapshots[-1]))
    parts += [Text(escape_controls(note), style="yellow") for note in run.notes]
    return Group(*parts)


def _make_head(run: RunRecord) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_row(Text(escape_controls(run.label), style="bold"), run.status, _show_steps(run))
    sentence = Text(escape_controls(describe_recipe(run.keys)), style="dim")
    if run.max_steps is None:
        return Group(table, sentence)
    bar = Table.grid(expand=True)  # a bar alone ends no line
    bar.add_row(ProgressBar(total=run.max_steps, completed=min(run.done, run.max_steps)))
    return Group(table, bar, sentence)


def _show_steps(run: RunRecord) -> str:
    done, max_steps, seconds = run.done, run.max_steps, find_last(run.logs, "train_seconds")
    if max_steps is None:
        return f"step {done:,}"
    text = f"step {done:,} of {max_steps:,}"
    if seconds is None or not 0 < done < max_steps:
        return text
    return f"{text}, {_show_seconds(seconds)} so far, about {_show_seconds(seconds * (max_steps - done) / done)} left"


def _show_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _make_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> RenderableType:
    table = Table(title="curves", title_justify="left", box=None, pad_edge=False, title_style="bold")
    for title in ("", "first", "now"):
        table.add_column(title, justify="right" if title else "left")
    table.add_column("", no_wrap=True)
    for name, points in [*curves.items()][:CURVES]:
        title, unit = name_curve(name)
        factor = 100.0 if unit == "%" else 1.0
        values = [factor * value for _, value in points]
        table.add_row(
            f"{title} ({unit})" if unit else title, f"{values[0]:.4g}", f"{values[-1]:.4g}", draw_line(values)
        )
    return table


def draw_line(values: Sequence[float], width: int = 40) -> str:
    """A curve as blocks, from its lowest to its highest value; each block is the mean of its part."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    number = min(width, len(finite))
    edges = [i * len(finite) // number for i in range(number + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    if span <= 0.01 * max(map(abs, means)):  # noise would look like a curve
        return BLOCKS[0] * number
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1))] for mean in means)


def _read_rollouts(folder: str) -> list[dict[str, Any]]:
    """The last rollouts of ``save_rollouts``, from the end of the file."""
    try:
        with open(os.path.join(folder, "rollouts.jsonl"), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().split(b"\n")[:-1]  # a killed process may have written a part of a line
    except OSError:
        return []
    rollouts = list[dict[str, Any]]()
    for line in lines:
        with suppress(ValueError):  # the first line may be cut
            rollouts.append(json.loads(line))
    return [rollout for rollout in rollouts if isinstance(rollout, dict)][-ROLLOUTS:]


def _make_rollouts(rollouts: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = Table(title="latest rollouts", title_justify="left", show_lines=True, title_style="bold")
    table.add_column("prompt", ratio=2)
    table.add_column("completion", ratio=3)
    for rollout in rollouts:
        table.add_row(*(Text(escape_controls(str(rollout.get(name, "")))) for name in ("prompt", "completion")))
    return table


def _make_selection(snapshot: Snapshot) -> RenderableType:
    """The first sequence: its background is the student's entropy, and chosen positions are underlined."""
    rows = snapshot.find_rows(0)
    places = [position + 1 for position in snapshot.columns["position"][rows].tolist()]
    entropies = dict(zip(places, snapshot.columns["student_entropy"][rows].tolist(), strict=True))
    weights = dict(zip(places, snapshot.columns["weight"][rows].tolist(), strict=True))
    highest = max(entropies.values(), default=0.0) or 1.0
    text = Text()
    for place, token in enumerate(snapshot.samples[0]["input_ids"][:TOKENS]):
        words = escape_controls(snapshot.get_text(token))
        if place not in entropies:
            text.append(words, style="dim")
            continue
        text.append(words, style=_choose_style(entropies[place] / highest, weights[place] > 0))
    return Panel(
        text,
        title=f"selection after {snapshot.step} steps ({snapshot.source})",
        subtitle=f"background: student entropy, 0 to {highest:.2f} nats; underlined: chosen",
        title_align="left",
        subtitle_align="left",
    )


def _choose_style(share: float, is_chosen: bool) -> Style:
    """From white to blue on black or white letters, whatever the terminal's colours."""
    red, green, blue = (round(255 + share * (end - 255)) for end in (33, 102, 172))
    front = "white" if share > 0.6 else "black"
    return Style(color=front, bgcolor=f"rgb({red},{green},{blue})", bold=is_chosen, underline=is_chosen)
