"""Take the figures of a sweep of the study into a folder, as the files behind docs/results.md.

    cd runs/study/task_good
    python scripts/study_data.py scores study_task_off_policy --output docs/data/task_off_policy_good
    python scripts/study_data.py seconds study_task_off_policy --output docs/data/task_off_policy_good

`scores` writes OUTPUT.csv, a line a method and score: mean and standard deviation over the seeds, the value of each
seed, and the differences to the baseline and to RandomPos 20 %, paired by seeds and items, with their standard errors.
It also writes OUTPUT_grid.csv: the validation score at each learning rate.

`seconds` trains each method alone for some steps, in an order that turns each round, and writes OUTPUT_seconds.csv: the
median seconds of a step, and the seconds of the steps that the method has in the sweep. Nothing else should run.
"""

import argparse
import csv
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
from tqdm import tqdm
from transformers import TrainerCallback

from sekd.recipe import Run
from sekd.sweep.file import Sweep, SweepRun, read_sweep
from sekd.sweep.run_state import check_runs, write_recipe
from sekd.sweep.steps import gather_scores, score_grid
from sekd.sweep.table import make_cell

RANDOM = "RandomPos 20%"
WARM_UP = 2
"""The first steps of a run, which do not count."""


def write_scores(sweep: Sweep, output: str) -> None:
    """Write the scores of the chosen points, and the validation scores of all points."""
    facts = check_runs(sweep)
    columns, lines = gather_scores(sweep, facts)
    compared = {"baseline": sweep.baseline, "random": RANDOM}
    by_name = {line.method: line for line in lines}
    rows = []
    for line in lines:
        for column in columns:
            cells = {name: make_cell(column, line, by_name.get(other)) for name, other in compared.items()}
            cell = cells["baseline"]
            if cell is None:
                continue
            values = [column.values[model] for model in line.models.values()]
            row = [line.method, line.place, column.label, cell.mean, cell.deviation, cell.seeds, join(values)]
            for other in cells.values():
                row += [None, None] if other is None else [other.difference, other.errors.total]
            rows.append(row)
    header = ["method", "point", "score", "mean", "deviation", "seeds", "values"]
    for name in compared:
        header += [f"difference_to_{name}", f"stderr_to_{name}"]
    write_csv(f"{output}.csv", header, rows)
    score, points = score_grid(sweep, facts)
    if score is not None:
        rows = [[p.method, p.place, score.label, join(score.values[m] for m in p.models.values())] for p in points]
        write_csv(f"{output}_grid.csv", ["method", "point", "score", "values"], rows)


def write_seconds(sweep: Sweep, output: str, steps: int, rounds: int) -> None:
    """Write the seconds of a step of each method. They do not depend on the point of the grid."""
    runs = {run.method: run for run in sweep.runs}
    seconds = defaultdict[str, list[float]](list)
    names = list(runs)
    for round_ in range(rounds):
        for method in tqdm(names[round_ % len(names) :] + names[: round_ % len(names)], desc=f"round {round_ + 1}"):
            seconds[method] += time_steps(runs[method], steps)
    rows = []
    for method, run in runs.items():
        median = statistics.median(seconds[method])
        rows.append([method, median, run.keys["max_steps"], median * run.keys["max_steps"]])
    write_csv(f"{output}_seconds.csv", ["method", "seconds_per_step", "steps", "seconds"], rows)


def time_steps(run: SweepRun, steps: int) -> list[float]:
    """The seconds of each step of a short run, without its first ones."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "recipe.yaml")
        write_recipe(path, run)
        flags = ["--output_dir", os.path.join(folder, "run"), "--max_steps", str(WARM_UP + steps)]
        trainer = Run.parse(path, [*flags, "--eval_strategy", "no", "--disable_tqdm", "true"]).trainer()
        clock = StepClock()
        trainer.add_callback(clock)
        trainer.train()
        trainer.close()
    return clock.seconds[WARM_UP:]


class StepClock(TrainerCallback):
    """Measures each step, with its generation and its data."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def join(values: Iterable[float | None]) -> str:
    """Values as a text."""
    return " ".join("-" if value is None else repr(value) for value in values)


def write_csv(path: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a file with a header."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scores", "seconds"])
    parser.add_argument("sweep", help="a file, or a sweep that sekd ships")
    parser.add_argument("--output", required=True, help="the files' path, without their ending")
    parser.add_argument("--steps", type=int, default=10, help="steps that count, in a round (10)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all methods (3)")
    options, overrides = parser.parse_known_args()
    datasets.disable_progress_bars()
    sweep = read_sweep(options.sweep, overrides)
    if options.what == "scores":
        write_scores(sweep, options.output)
    else:
        write_seconds(sweep, options.output, options.steps, options.rounds)


if __name__ == "__main__":
    main()
