#!/usr/bin/env python3
"""What a step costs against T, B, V and k, one at a time around a base point: tables, a CSV file and plots.

    python scripts/bench_costs.py [--output_dir runs/costs] [--T 256 512 1024 2048 4096] [--base_T 512] [--rounds 7]

The models have random weights and a small body, so that every vocabulary fits. bench_step.py makes the steps. In each
round every step of an axis runs once, so that a busy minute of the machine touches all points. The dense step is left
out where it does not fit. Under each table stands what theory expects, and whether it holds. Seconds are a straight
line if R² of a fitted line is at least 0.99. Memory is flat if it grows by at most a tenth between the last two points.
Before, it may grow: few positions do not fill a chunk.
"""

import argparse
import csv
import os
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch
from bench_step import (
    BACKBONES,
    CHUNKED,
    DENSE,
    DTYPES,
    SEKD,
    Steps,
    add_common_options,
    at_least,
    find_device,
    make_steps,
    peak_bytes,
    random_batch,
    time_step,
)
from bench_table import write_figures
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from sekd.models import freeze

MIB = 2**20
STYLES = {
    BACKBONES: ("#777777", "o"),
    SEKD: ("#0072B2", "s"),
    CHUNKED: ("#009E73", "^"),
    DENSE: ("#D55E00", "D"),
}
"""Method -> its colour, of Okabe and Ito's palette, and its marker."""
DISTILLING = (SEKD, CHUNKED, DENSE)
DENSE_TENSORS = 7
"""Float32 tensors [B T V] that the dense step holds at once, at most."""


@dataclass(frozen=True)
class Axis:
    """One size that varies: ``values`` in ``unit``, around ``base``. Slopes are per ``per`` units.

    In theory, seconds are a straight line for the methods ``straight``, and memory above the backbones does not grow
    for the methods ``flat``. ``note`` says what else theory says.
    """

    label: str
    base: int
    values: tuple[int, ...]
    per: int = 1
    straight: tuple[str, ...] = ()
    flat: tuple[str, ...] = ()
    note: str = ""


AXES = {
    "T": Axis(
        "T, tokens of a sequence",
        512,
        (256, 512, 1024, 2048, 4096),
        per=1000,
        flat=(SEKD, CHUNKED),
        note="Attention takes time quadratic in T, so no straight line is expected.",
    ),
    "B": Axis("B, sequences", 1, (1, 2, 4, 8), straight=(BACKBONES, *DISTILLING), flat=(SEKD, CHUNKED)),
    "V": Axis(
        "V, classes",
        32768,
        (8192, 32768, 65536, 114688, 151936),
        per=1000,
        straight=DISTILLING,
        note="Memory grows with V for every method: the logits of a chunk, and the gradient of the head.",
    ),
    "k": Axis(
        "k, % of the positions",
        20,
        (1, 5, 10, 20, 50, 100),
        straight=(SEKD,),
        flat=(SEKD,),
        note="The other methods do not depend on k.",
    ),
}


@dataclass(frozen=True)
class Cost:
    """Of one method at one point: median seconds of a step, and MiB, above the backbones for all other methods."""

    seconds: float
    mib: float


@dataclass(frozen=True)
class Point:
    """The steps of one point of an axis, by method, and their MiB as in :class:`Cost`."""

    student: Qwen3ForCausalLM
    steps: Steps
    mib: dict[str, float]


Costs = dict[str, dict[int, Cost]]
"""Method -> value on an axis -> cost. Where the dense step does not fit, it has no cost."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, axis in AXES.items():
        parser.add_argument(f"--{name}", type=at_least(1), nargs="+", default=axis.values, help=axis.label)
        parser.add_argument(f"--base_{name}", type=at_least(1), default=axis.base, help=f"{name} on the other axes")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of both models, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="of the student")
    parser.add_argument("--teacher_layers", type=int, default=8)
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument("--output_dir", default="runs/costs")
    add_common_options(parser)
    options = parser.parse_args()
    os.makedirs(options.output_dir, exist_ok=True)
    base = {name: getattr(options, f"base_{name}") for name in AXES}
    axes = {name: replace(axis, values=tuple(sorted({*getattr(options, name)}))) for name, axis in AXES.items()}
    costs: dict[str, Costs] = {}
    rows = {}
    for name, axis in axes.items():
        points = {value: prepare(options, **base | {name: value}) for value in axis.values}
        costs[name] = measure(points, options.rounds)
        lines = {method: fit(by_value, axis.per) for method, by_value in costs[name].items() if len(by_value) > 1}
        rows |= {f"{name}: {method}": figures for method, figures in lines.items()}
        others = ", ".join(f"{other} {base[other]}{' %' * (other == 'k')}" for other in AXES if other != name)
        show(name, axis, costs[name], lines, f"a step against {name} ({others}), {options.dtype}")
    write_csv(os.path.join(options.output_dir, "costs.csv"), costs)
    plot(options.output_dir, axes, costs)
    write_figures(options.json, f"cost of a step, {options.dtype}", rows)


def prepare(options: argparse.Namespace, T: int, B: int, V: int, k: int) -> Point:
    """The steps of one point, and their memory."""
    device = find_device()
    dtype = DTYPES[options.dtype]
    student = make_model(options, V, options.layers).to(device).train()
    teacher = freeze(make_model(options, V, options.teacher_layers)).to(device, dtype)
    steps = make_steps(student, teacher, random_batch(B, T, V, device), k / 100, options.chunk_rows, dtype)
    fits = free_bytes(device) > DENSE_TENSORS * 4 * B * T * V
    steps = {method: steps[method] for method in STYLES if fits or method != DENSE}
    memory = {method: peak_bytes(step, student) / MIB for method, step in steps.items()}  # warms up
    above = {method: mib - (method != BACKBONES) * memory[BACKBONES] for method, mib in memory.items()}
    return Point(student, steps, above)


def measure(points: dict[int, Point], rounds: int) -> Costs:
    """The cost of each method at each point of an axis."""
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for value, point in points.items():
            for method, step in point.steps.items():
                times[method, value].append(time_step(step, point.student))
    return {
        method: {
            value: Cost(statistics.median(times[method, value]), point.mib[method])
            for value, point in points.items()
            if method in point.steps
        }
        for method in STYLES
    }


def make_model(options: argparse.Namespace, vocab: int, layers: int) -> Qwen3ForCausalLM:
    heads = options.hidden // 64
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available


def fit(costs: dict[int, Cost], per: int) -> dict[str, float]:
    """R² of a line through the seconds, the memory's slope, and its growth between the last two points."""
    values, seconds = [*costs], [cost.seconds for cost in costs.values()]
    mib = [cost.mib for cost in costs.values()]
    return {
        "R² of seconds": float(np.corrcoef(values, seconds)[0, 1] ** 2),
        "slope of memory": float(np.polyfit(values, mib, 1)[0]) * per,
        "growth of memory": mib[-1] / mib[-2],
    }


def show(name: str, axis: Axis, costs: Costs, lines: dict[str, dict[str, float]], title: str) -> None:
    """Print an axis: its table, and under it what theory expects and whether it holds."""
    table = Table(name, title=title, caption="MiB: the peak of the backbones; of the others, above that", box=SIMPLE)
    for unit in ("seconds", "MiB"):
        for method in costs:
            table.add_column(f"{method}, {unit}", justify="right")
    for value in axis.values:
        cells = [by_value.get(value) for by_value in costs.values()]
        table.add_row(
            f"{value:,}",
            *("" if cost is None else f"{cost.seconds:.3f}" for cost in cells),
            *("" if cost is None else f"{cost.mib:,.0f}" for cost in cells),
        )
    table.add_section()
    table.add_row(
        f"R², MiB per {axis.per:,}",
        *(f"{lines[method]['R² of seconds']:.3f}" if method in lines else "" for method in costs),
        *(f"{lines[method]['slope of memory']:+,.1f}" if method in lines else "" for method in costs),
    )
    console = Console(width=120)
    console.print(table)
    if axis.note:
        console.print(axis.note)
    for method in (method for method in axis.straight if method in lines):
        r2 = lines[method]["R² of seconds"]
        console.print(f"{method}: seconds are {'' if r2 >= 0.99 else 'not '}a straight line in {name} (R² {r2:.3f}).")
    for method in (method for method in axis.flat if method in lines):
        growth = lines[method]["growth of memory"]
        verdict = f"{'' if growth <= 1.1 else 'not '}flat in {name}"
        end = f"x{growth:.2f} from {axis.values[-2]:,} to {axis.values[-1]:,}"
        console.print(f"{method}: memory above the backbones is {verdict} ({end}).")
    console.print()


def write_csv(path: str, costs: dict[str, Costs]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["axis", "value", "method", "seconds", "mib"])
        for name, by_method in costs.items():
            for method, by_value in by_method.items():
                writer.writerows([name, value, method, cost.seconds, cost.mib] for value, cost in by_value.items())


def plot(folder: str, axes: dict[str, Axis], costs: dict[str, Costs]) -> None:
    """Write costs.png and costs.svg: a column of panels for each axis, seconds above, memory below."""
    figure = Figure(figsize=(12.8, 6.2), layout="constrained")
    panels = figure.subplots(2, len(axes), sharex="col", squeeze=False)
    for (name, axis), (top, bottom) in zip(axes.items(), panels.T, strict=True):
        for method, by_value in costs[name].items():
            colour, marker = STYLES[method]
            style = dict(color=colour, marker=marker, markersize=5, linewidth=1.8, clip_on=False)
            top.plot([*by_value], [cost.seconds for cost in by_value.values()], label=method, **style)
            if method != BACKBONES:
                bottom.plot([*by_value], [cost.mib for cost in by_value.values()], **style)
        bottom.set_xlabel(axis.label)
        for scale in (bottom.xaxis, bottom.yaxis):
            scale.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        for panel in (top, bottom):
            panel.set_ylim(bottom=0)
            panel.set_xlim(left=0)
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(axis="y", color="#DDDDDD", linewidth=0.8)
            panel.set_axisbelow(True)
            panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    panels[0, 0].set_ylabel("seconds of a step")
    panels[1, 0].set_ylabel("MiB above the backbones")
    figure.align_ylabels()
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    for ending in ("png", "svg"):
        figure.savefig(os.path.join(folder, f"costs.{ending}"), dpi=200)


if __name__ == "__main__":
    main()
