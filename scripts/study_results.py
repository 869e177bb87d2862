"""Make the tables and the picture of docs/results.md from the files in docs/data.

    python scripts/study_results.py            # rewrites them
    python scripts/study_results.py --check    # exits with 1 if a table in the page is not what the files say

scripts/study_data.py makes the files. A table stands between the lines `<!-- table NAME -->` and `<!-- end -->`.
"""

import argparse
import csv
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
FULL, RANDOM = "Full KD", "RandomPos 20%"


@dataclass(frozen=True)
class Regime:
    """A sweep of the study, and how its table is shown.

    Attributes:
        title: in the picture.
        score: the main score, as the files name it.
        label: how it is called.
        factor: 100 for shares in percent.
        digits: of the main score, after the point.
        beside: other scores of the table: label -> name, factor and digits.
        seconds: the regime whose seconds of a step count here too, since its models have the same sizes.
    """

    title: str
    score: str
    label: str
    factor: float
    digits: int
    beside: Mapping[str, tuple[str, float, int]]
    seconds: str | None = None


TEXT = "text (train[:48])"
"""How the files name the test documents of `heal`."""
OF_TASK = {
    "reverse KL": ("rollouts reverse_kl", 1.0, 3),
    "KL": ("text forward_kl", 1.0, 3),
    "ECE %": ("text ece", 100.0, 2),
}
OF_TEXT = {"perplexity": (f"{TEXT} perplexity", 1.0, 1), "ECE %": (f"{TEXT} ece", 100.0, 1)}
REGIMES = {
    "heal": Regime("prune and heal, web text", f"{TEXT} forward_kl", "KL", 1.0, 3, OF_TEXT),
    "task_off_policy_good": Regime(
        "task, off-policy, good start", "rollouts math_verify", "exact match %", 100.0, 1, OF_TASK
    ),
    "task_on_policy_good": Regime(
        "task, on-policy, good start", "rollouts math_verify", "exact match %", 100.0, 1, OF_TASK
    ),
    "task_off_policy_poor": Regime(
        "task, off-policy, poor start",
        "rollouts math_verify",
        "exact match %",
        100.0,
        1,
        OF_TASK,
        seconds="task_off_policy_good",
    ),
    "task_on_policy_poor": Regime(
        "task, on-policy, poor start", "rollouts math_verify", "exact match %", 100.0, 1, OF_TASK
    ),
}
DRAWN = ("heal", "task_off_policy_good")
"""The regimes of the picture."""
SHORTER = re.compile(r"Full KD, (\d+) steps")
"""Methods that are Full KD with fewer steps."""


@dataclass(frozen=True)
class Method:
    """The figures of a method: its scores by name, and its seconds.

    Attributes:
        values: of the main score, a value a seed.
        steps: of a run; None for models that were not trained.
        seconds: of a whole run, on a quiet machine; None for models that were not trained.
    """

    name: str
    point: str
    rows: Mapping[str, Mapping[str, str]]
    values: Sequence[float]
    steps: int | None
    per_step: float | None
    seconds: float | None


def read_methods(name: str, regime: Regime) -> dict[str, Method]:
    """The methods of a regime, in the order of its table."""
    rows: dict[str, dict[str, dict[str, str]]] = {}
    for row in read_csv(DOCS / "data" / f"{name}.csv"):
        rows.setdefault(row["method"], {})[row["score"]] = row
    rates: dict[str, list[float]] = {}
    for row in read_csv(DOCS / "data" / f"{name}_grid.csv"):
        rates.setdefault(row["method"], []).append(float(row["point"].removeprefix("learning_rate ")))
    times = {row["method"]: row for row in read_csv(DOCS / "data" / f"{regime.seconds or name}_seconds.csv")}
    methods = {}
    for method, scores in rows.items():
        main, time = scores[regime.score], times.get(method)
        methods[method] = Method(
            method,
            mark_edge(main["point"].removeprefix("learning_rate "), rates.get(method, [])),
            scores,
            [float(value) for value in main["values"].split()],
            None if time is None else int(time["steps"]),
            None if time is None else float(time["seconds_per_step"]),
            None if time is None else float(time["seconds"]),
        )
    return methods


def mark_edge(rate: str, rates: Sequence[float]) -> str:
    """A learning rate, with a mark if it is the lowest or the highest of the grid: a better one may lie beyond."""
    if not rates:
        return rate
    return "≤ " * (float(rate) == min(rates)) + "≥ " * (float(rate) == max(rates)) + rate


def at_seconds(methods: Mapping[str, Method], seconds: float) -> list[float] | None:
    """The scores of Full KD after so many seconds, one a seed: on a line between its runs of different lengths.

    None outside the lengths that were run.
    """
    runs = sorted(
        (m.seconds, m.values) for m in methods.values() if m.seconds and (m.name == FULL or SHORTER.fullmatch(m.name))
    )
    for (low, first), (high, second) in pairwise(runs):
        if low <= seconds <= high:
            share = (seconds - low) / (high - low)
            return [a + share * (b - a) for a, b in zip(first, second, strict=False)]
    return None


def compare_at_equal_seconds(methods: Mapping[str, Method], method: Method) -> tuple[float, float | None] | None:
    """The mean difference to Full KD at the method's own seconds, paired by seeds, and its standard error."""
    if method.seconds is None or (others := at_seconds(methods, method.seconds)) is None:
        return None
    differences = [a - b for a, b in zip(method.values, others, strict=False)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return statistics.fmean(differences), error


def make_table(regime: Regime, methods: Mapping[str, Method]) -> str:
    """A regime's table in Markdown."""
    number = max(len(method.values) for method in methods.values())
    has_seconds = any(method.seconds for method in methods.values())
    header = [
        f"method ({number} seeds)",
        "learning rate",
        regime.label,
        "minus Full KD",
        "minus RandomPos 20 %",
        *regime.beside,
        *["s a step", "minus Full KD, equal seconds"] * has_seconds,
    ]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for method in methods.values():
        main = method.rows[regime.score]
        name = method.name
        if method.point and len(method.values) < number:
            name += f" ({len(method.values)})"
        cells = [name.replace("%", " %"), method.point, show(main["mean"], main["deviation"], regime)]
        for other, itself in (("baseline", FULL), ("random", RANDOM)):
            difference, error = main[f"difference_to_{other}"], main[f"stderr_to_{other}"]
            cells.append(show(difference, error, regime, "+") if method.point and method.name != itself else "")
        for score, factor, digits in regime.beside.values():
            cells.append(f"{factor * float(method.rows[score]['mean']):.{digits}f}" if score in method.rows else "")
        if has_seconds:
            cells.append("" if method.per_step is None else f"{method.per_step:.2f}")
            equal = compare_at_equal_seconds(methods, method)
            is_full = method.name == FULL or SHORTER.fullmatch(method.name)
            cells.append("" if equal is None or is_full else show(*equal, regime, "+"))
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


GRADIENTS = {
    "positions chosen %": ("fraction", 100.0, 1),
    "SE-KD's positions chosen %": ("overlap", 100.0, 0),
    "share of the KL %": ("kl_share", 100.0, 1),
    "cosine": ("cosine", 1.0, 3),
    "cosine to other batches": ("cosine_to_mean", 1.0, 3),
    "norm": ("norm", 1.0, 2),
    "norm / Full KD's": ("norm_over_full", 1.0, 2),
}
"""Columns of the table of gradients: label -> column of the file, factor and digits."""


def make_gradients(name: str) -> str:
    """The table of the first gradients of a regime's methods in Markdown."""
    lines = [["method", *GRADIENTS], ["---", *["---:"] * len(GRADIENTS)]]
    for row in read_csv(DOCS / "data" / f"{name}_gradients.csv"):
        cells = [f"{factor * float(row[column]):.{digits}f}" for column, factor, digits in GRADIENTS.values()]
        lines.append([row["method"].replace("%", " %"), *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def make_entropy(name: str) -> str:
    """The table of the student's entropy over the training of a regime's methods in Markdown."""
    entropies: dict[str, dict[int, str]] = {}
    for row in read_csv(DOCS / "data" / f"{name}_entropy.csv"):
        entropies.setdefault(row["method"], {})[int(row["step"])] = f"{float(row['entropy']):.3f}"
    steps = sorted({step for of_method in entropies.values() for step in of_method})
    lines = [["method", *(f"step {step}" for step in steps)], ["---", *["---:"] * len(steps)]]
    lines += [[method.replace("%", " %"), *(of.get(step, "") for step in steps)] for method, of in entropies.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def show(value: str | float | None, spread: str | float | None, regime: Regime, sign: str = "") -> str:
    """A score with its spread, in the regime's digits."""
    if value in (None, ""):
        return ""
    text = f"{regime.factor * float(value):{sign}.{regime.digits}f}"
    return text if spread in (None, "") else f"{text} ± {regime.factor * float(spread):.{regime.digits}f}"


def fill_tables(page: str) -> str:
    """The page, with its tables made again."""

    def make(found: re.Match[str]) -> str:
        kind, name = found[1], found[2]
        others = {"gradients": make_gradients, "entropy": make_entropy}
        table = others[kind](name) if kind in others else make_table(REGIMES[name], read_methods(name, REGIMES[name]))
        return f"<!-- {kind} {name} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- (table|gradients|entropy) (\w+) -->\n.*?<!-- end -->", make, page, flags=re.DOTALL)


FAMILIES = (
    ("Full KD", "#222222", "o", re.compile(r"Full KD(, \d+ steps)?")),
    ("SE-KD, 1 to 50 %", "#1f77b4", "o", re.compile(r"SE-KD \d+%")),
    ("random positions, 1 to 50 %", "#d62728", "s", re.compile(r"RandomPos \d+%")),
    (
        "other scores and policies, 20 %",
        "#2ca02c",
        "^",
        re.compile(r"(Reverse KL|CE ratio|GLS|TIP|Pos RS.*|Cur.*) 20%"),
    ),
    ("AT-KD", "#9467bd", "D", re.compile("AT-KD")),
    ("selected samples or sampled classes", "#ff7f0e", "v", re.compile(r".*TopSmp.*|RS-KD|SE-KD_3X.*")),
)
"""Kinds of methods in the picture: label, colour, marker, names. A line connects the lengths of Full KD."""


LABELS = {f"{name} {k}%": f"{k} %" for name in ("SE-KD", "RandomPos") for k in (1, 5, 20, 50)}
"""What stands beside a point; beside Full KD the number of its steps."""


def draw(path: Path) -> None:
    """Draw quality against cost: a panel a regime, a point a method, with the standard deviation over the seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = {name: read_methods(name, REGIMES[name]) for name in DRAWN}
    figure, axes = plt.subplots(1, len(shown) + 1, figsize=(4.6 * (len(shown) + 1), 4.6), squeeze=False)
    for axis, (name, methods) in zip(axes[0], shown.items(), strict=False):
        draw_costs(axis, REGIMES[name], methods)
    draw_rates(axes[0][-1], "task_off_policy_good")
    shown_lines = [axis.get_legend_handles_labels() for axis in axes[0][:-1]]
    legend = {label: handle for handles, labels in shown_lines for handle, label in zip(handles, labels, strict=True)}
    figure.legend([*legend.values()], [*legend], loc="lower left", ncols=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=130)


def draw_costs(axis: Any, regime: Regime, methods: Mapping[str, Method]) -> None:
    """Quality against seconds: a point a method."""
    whole = methods[FULL].seconds or 1.0
    for label, colour, marker, names in FAMILIES:
        points = [m for m in methods.values() if m.seconds and names.fullmatch(m.name) and len(m.values) > 1]
        points.sort(key=lambda method: method.seconds or 0)
        if not points:
            continue
        costs = [(m.seconds or 0) / whole for m in points]
        means = [regime.factor * statistics.fmean(m.values) for m in points]
        spreads = [regime.factor * statistics.stdev(m.values) for m in points]
        line = "-" if label == FULL else ""
        axis.errorbar(costs, means, spreads, color=colour, marker=marker, ls=line, capsize=3, label=label, ms=6)
        for method, cost, mean in zip(points, costs, means, strict=True):
            is_full = label == FULL
            if text := f"{method.steps} steps" if is_full else LABELS.get(method.name):
                place = (-9, -15) if is_full else (7, -3)
                axis.annotate(text, (cost, mean), place, textcoords="offset points", fontsize=8, color=colour)
    if (before := methods.get("Student before")) is not None:
        height = regime.factor * before.values[0]
        axis.axhline(height, color="#999999", ls=":", lw=1)
        style = {"xycoords": ("axes fraction", "data"), "va": "bottom", "fontsize": 8, "color": "#777777"}
        axis.annotate("student before", (0.01, height), **style)
    axis.set_title(regime.title, fontsize=11)
    axis.set_xlabel("seconds of training, Full KD = 1")
    axis.set_ylabel(regime.label + (" (lower is better)" if regime.factor == 1 else ""))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


RATES = {
    FULL: ("#222222", "o"),
    "Full KD, clipped at 0.2": ("#888888", "o"),
    "SE-KD 20%": ("#1f77b4", "o"),
    "SE-KD 20%, clipped at 4.8": ("#7fb8e6", "o"),
    RANDOM: ("#d62728", "s"),
}
"""Methods whose learning rates are drawn: colour and marker."""


def draw_rates(axis: Any, name: str) -> None:
    """The validation score at each learning rate."""
    rows = read_csv(DOCS / "data" / f"{name}_grid.csv")
    for method, (colour, marker) in RATES.items():
        points = [
            (
                float(row["point"].removeprefix("learning_rate ")),
                100 * statistics.fmean(map(float, row["values"].split())),
            )
            for row in rows
            if row["method"] == method
        ]
        if points:
            points.sort()
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker)
            text = method.replace("%", " %")
            axis.annotate(text, points[-1], (7, -3), textcoords="offset points", fontsize=8.5, color=colour)
    axis.set_xscale("log")
    axis.set_title("learning rate: task, off-policy, good start, seed 0", fontsize=11)
    axis.set_xlabel("learning rate")
    axis.set_ylabel("exact match % on the validation problems")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.06)
    axis.set_xlim(right=axis.get_xlim()[1] * 3.5)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file, by its header; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is not up to date")
    options = parser.parse_args()
    path = DOCS / "results.md"
    page = path.read_text()
    filled = fill_tables(page)
    if options.check:
        return int(filled != page)
    path.write_text(filled)
    draw(DOCS / "results.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
