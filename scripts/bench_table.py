#!/usr/bin/env python3
"""The figures of the benchmarks beside their aims, from the JSON files of scripts/bench_all.sh.

    python scripts/bench_table.py FOLDER

The table is in Markdown. A figure that no file has is "not measured". The kind of CPU of this machine is printed first:
some aims depend on it.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from sekd.files import write_atomically
from sekd.hardware import choose_dtype

AVX2, BF16 = "AVX2", "AVX512-bf16"
Figures = Mapping[str, float | str]


@dataclass(frozen=True)
class Aim:
    """A figure, where it stands (file, row, column), and its limit on each kind of CPU: a maximum, or a minimum."""

    figure: str
    file: str
    row: str
    column: str
    limits: dict[str, float]
    is_minimum: bool = False


def on_any(limit: float) -> dict[str, float]:
    return {AVX2: limit, BF16: limit}


SEKD, SAMPLER, FULL = "SE-KD", "SE-KD, sampler's scores", "Full KD in chunks"
TRAINER_SEKD, TRAINER_FULL = "sekd SE-KD 20%", "sekd Full KD"
MEMORY, GROWTH, R2 = "above backbones, of dense", "growth of memory", "R² of seconds"
GKD, DISTILLATION = "seconds_over_gkd", "seconds_over_distillation"
AIMS = [
    Aim("SE-KD 20 % / dense", "step", SEKD, "of dense", {AVX2: 0.82, BF16: 0.66}),
    Aim("SE-KD 20 %, sampler's scores / dense", "step", SAMPLER, "of dense", {AVX2: 0.74, BF16: 0.63}),
    Aim("SE-KD 20 % / backbones", "step", SEKD, "of backbones", {AVX2: 1.23, BF16: 1.12}),
    Aim("SE-KD 20 %, sampler's scores / backbones", "step", SAMPLER, "of backbones", {AVX2: 1.11, BF16: 1.08}),
    Aim("Full KD in chunks / dense", "step", FULL, "of dense", on_any(0.97)),
    Aim("memory above backbones / dense, SE-KD 20 %", "step", SEKD, MEMORY, on_any(0.12)),
    Aim("memory above backbones / dense, Full KD in chunks", "step", FULL, MEMORY, on_any(0.12)),
    Aim("growth of that memory, T 2048 to 4096, SE-KD 20 %", "costs", f"T: {SEKD}", GROWTH, on_any(1.1)),
    Aim("growth of that memory, T 2048 to 4096, Full KD in chunks", "costs", f"T: {FULL}", GROWTH, on_any(1.1)),
    Aim("growth of that memory, B 4 to 8, SE-KD 20 %", "costs", f"B: {SEKD}", GROWTH, on_any(1.1)),
    Aim("growth of that memory, B 4 to 8, Full KD in chunks", "costs", f"B: {FULL}", GROWTH, on_any(1.1)),
    Aim("growth of that memory, k 50 % to 100 %, SE-KD", "costs", f"k: {SEKD}", GROWTH, on_any(1.1)),
    Aim("R² of SE-KD's seconds as a line in B", "costs", f"B: {SEKD}", R2, on_any(0.99), True),
    Aim("R² of SE-KD's seconds as a line in V", "costs", f"V: {SEKD}", R2, on_any(0.99), True),
    Aim("R² of SE-KD's seconds as a line in k", "costs", f"k: {SEKD}", R2, on_any(0.99), True),
    Aim("SE-KD 20 % in the trainer / GKDTrainer", "peers", TRAINER_SEKD, GKD, on_any(0.73)),
    Aim("SE-KD 20 % in the trainer / DistillationTrainer", "peers", TRAINER_SEKD, DISTILLATION, on_any(0.64)),
    Aim("Full KD in the trainer / GKDTrainer", "peers", TRAINER_FULL, GKD, on_any(0.90)),
    Aim("Full KD in the trainer / DistillationTrainer", "peers", TRAINER_FULL, DISTILLATION, on_any(0.79)),
    Aim("peak memory of Full KD in the trainer / TRL's least", "peers", TRAINER_FULL, "bytes_over_least", on_any(0.8)),
    Aim("tokens a second, VLLMEngine / bare LLM", "rollouts", "vllm", "of bare", on_any(0.97), True),
    Aim("SE-KD_3X from a cache / Full KD", "3x", "SE-KD_3X, cache reused", "of Full KD", on_any(1 / 12)),
    Aim("SE-KD_3X with scoring and build / Full KD", "3x", "SE-KD_3X in all", "of Full KD", on_any(1 / 4)),
    Aim("seconds of the demo", "demo", "demo", "seconds", on_any(360)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    figures = read_figures(parser.parse_args().folder)
    kind = BF16 if choose_dtype(on_cpu=True) == "bfloat16" else AVX2
    table = Table("figure", "aim", "reached", "", box=MARKDOWN)
    for aim in AIMS:
        limit, value = aim.limits[kind], figures.get((aim.file, aim.row, aim.column))
        is_met = value is not None and (value >= limit if aim.is_minimum else value <= limit)
        table.add_row(
            aim.figure,
            f"{'≥' if aim.is_minimum else '≤'} {limit:.3g}",
            "not measured" if value is None else f"{value:.3g}",
            "yes" if is_met else "" if value is None else "no",
        )
    console = Console(width=120)
    console.print(f"CPU: {kind}{', with AMX' * torch.cpu._is_amx_tile_supported()}")
    console.print(table)


def read_figures(folder: Path) -> dict[tuple[str, str, str], float]:
    """The figures in the folder's JSON files, by file, row and column. A file that is none is named and left out."""
    if not folder.is_dir():
        raise SystemExit(f"bench_table: no such folder: {folder}")
    figures = {}
    for path in folder.glob("*.json"):
        try:
            for row in json.loads(path.read_text())["rows"]:
                figures |= {(path.stem, row["name"], column): value for column, value in row["figures"].items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            print(f"bench_table: {path} has no figures of a benchmark: delete it, or measure again")
    return figures


def write_figures(path: str | None, title: str, rows: Mapping[str, Figures]) -> None:
    """Write a benchmark's rows, by name, as JSON, if there is a path."""
    if path:
        named = [{"name": name, "figures": figures} for name, figures in rows.items()]
        write_atomically(path, json.dumps({"title": title, "rows": named}, indent=1) + "\n")


if __name__ == "__main__":
    main()
