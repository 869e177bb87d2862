"""Write the figures of a sweep of the study into files: docs/data has those that docs/results.md shows.

    cd runs/study/task_good
    python ../../../scripts/study_data.py scores study_task_off_policy --output off_policy
    python ../../../scripts/study_data.py seconds study_task_off_policy --output off_policy

`scores` writes OUTPUT.csv, a line a method and score: mean and standard deviation over the seeds, the value of each
seed, and the differences to the baseline and to RandomPos 20 %, paired by seeds and items, with their standard errors.
It also writes OUTPUT_grid.csv: the validation score at each learning rate.

`seconds` trains each method for some steps, alone and in random order. It writes OUTPUT_seconds.csv: the median seconds
of a step, its quartiles, the seconds of scoring samples before the first step, and the seconds of the whole run.
Nothing else should run meanwhile.

`entropy` writes OUTPUT_entropy.csv from the logs of the chosen points: the student's entropy on the sequences that it
trains on, and the length of its completions, a line a method and logged step. Means over the seeds.
"""

import argparse
import csv
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import datasets
from tqdm import tqdm
from transformers import TrainerCallback

from sekd.recipe import Run
from sekd.sweep.file import Sweep, SweepRun, read_sweep
from sekd.sweep.run_state import check_runs, is_finished, write_recipe
from sekd.sweep.steps import choose_points, gather_scores, score_grid
from sekd.sweep.table import make_cell
from sekd.trainer import SEKDTrainer

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


def write_entropy(sweep: Sweep, output: str) -> None:
    """Write the student's entropy and the length of its completions over the training."""
    chosen = choose_points(sweep, check_runs(sweep))
    logged = defaultdict[tuple[str, int], list[dict[str, float]]](list)
    for run in sweep.runs:
        if is_finished(run) and chosen.get(run.method) == run.place:
            with open(os.path.join(run.folder, "metrics.jsonl")) as file:
                for log in map(json.loads, file):
                    if "entropy" in log:
                        logged[run.method, log["step"]].append(log)
    rows = []
    for (method, step), logs in logged.items():
        means = [
            statistics.fmean(log[name] for log in logs) if name in logs[0] else None
            for name in ("entropy", "completion_length")
        ]
        rows.append([method, step, *means, len(logs)])
    write_csv(f"{output}_entropy.csv", ["method", "step", "entropy", "completion_length", "seeds"], rows)


def write_seconds(sweep: Sweep, output: str, steps: int, rounds: int) -> None:
    """Write the seconds of each method. Methods whose steps do the same work share one time.

    Learning rate, clipping and the number of steps change no work. ``scoring_seconds`` is the time before the first
    step that a run takes longer than one which chooses no samples.
    """
    works: dict[str, SweepRun] = {}
    names = {run.method: describe_work(run) for run in sweep.runs}
    for run in sweep.runs:
        works.setdefault(names[run.method], run)
    per_step, before = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    order = [*works] * rounds
    random.Random(0).shuffle(order)
    for work in tqdm(order, desc="seconds"):
        first, rest = time_run(works[work], steps)
        per_step[work] += rest
        before[work].append(first)
    rows = []
    for method, run in {run.method: run for run in sweep.runs}.items():
        work = names[method]
        median, number = statistics.median(per_step[work]), run.keys["max_steps"]
        scoring = 0.0
        if run.keys.get("sample_fraction", 1) < 1:
            others = [s for other, s in before.items() if works[other].keys.get("sample_fraction", 1) == 1]
            scoring = statistics.median(before[work]) - statistics.median(chain(*others))
        low, _, high = statistics.quantiles(per_step[work], n=4)
        rows.append([method, median, low, high, number, scoring, scoring + median * number])
    header = ["method", "seconds_per_step", "lower_quartile", "upper_quartile", "steps", "scoring_seconds", "seconds"]
    write_csv(f"{output}_seconds.csv", header, rows)


def describe_work(run: SweepRun) -> str:
    """The keys of a run that change the work of a step, as text."""
    free = ("learning_rate", "max_grad_norm", "max_steps", "eval_steps", "warmup_steps", "seed", "output_dir")
    return json.dumps({key: value for key, value in sorted(run.keys.items()) if key not in free}, default=str)


def time_run(run: SweepRun, steps: int) -> tuple[float, list[float]]:
    """The seconds until a short run is ready to train, and the seconds of each step after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        trainer = make_trainer(run, folder, "--max_steps", str(WARM_UP + steps), "--eval_strategy", "no")
        before = time.perf_counter() - started
        clock = StepClock()
        trainer.add_callback(clock)
        trainer.train()
        trainer.close()
    return before, clock.seconds[WARM_UP:]


def make_trainer(run: SweepRun, folder: str, *flags: str) -> SEKDTrainer:
    """The trainer of a run, which writes into a folder of its own."""
    path = os.path.join(folder, "recipe.yaml")
    write_recipe(path, run)
    return Run.parse(path, ["--output_dir", os.path.join(folder, "run"), "--disable_tqdm", "true", *flags]).trainer()


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
    """Write a file with a header, and each row as it comes."""
    with open(path, "w", newline="", buffering=1) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scores", "seconds", "entropy"])
    parser.add_argument("sweep", help="a file, or a sweep that sekd ships")
    parser.add_argument("--output", required=True, help="the files' path, without their ending")
    parser.add_argument("--steps", type=int, default=10, help="steps that count, in a round (10)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all methods (3)")
    options, overrides = parser.parse_known_args()
    datasets.disable_progress_bars()
    sweep = read_sweep(options.sweep, overrides)
    if options.what == "scores":
        write_scores(sweep, options.output)
    elif options.what == "entropy":
        write_entropy(sweep, options.output)
    else:
        write_seconds(sweep, options.output, options.steps, options.rounds)


if __name__ == "__main__":
    main()
