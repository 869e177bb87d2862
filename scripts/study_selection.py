"""Which selection works? The paper's tables 2 and 3 on a small pair: one budget, several seeds, held-out text.

Each run distils the student off-policy on packed text and is evaluated on held-out sequences: perplexity, KL to the
teacher, expected calibration error of the next token. Every finished run is a JSON file, so a study that was stopped
goes on where it was; the tables are made of what there is.

example:
  python scripts/study_selection.py STUDENT TEACHER 'text/*.jsonl' --output_dir runs/study --seeds 1337 1338 1339
"""

import argparse
import csv
import json
import os
import statistics
import time
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging

from sekd import SEKDConfig, SEKDTrainer
from sekd.data.load import load_rows
from sekd.data.prepare import prepare
from sekd.files import write_atomically
from sekd.scores import SCORES
from sekd.versions import installed_versions

NAMES = {
    "student_entropy": "Student entropy (SE-KD)",
    "teacher_entropy": "Teacher entropy",
    "student_ce": "Student CE",
    "teacher_ce": "Teacher CE",
    "kl": "KL",
    "reverse_kl": "Reverse KL",
    "ce_ratio": "CE ratio",
    "ce_ratio_plus_student_entropy": "CE ratio + student entropy",
    "kl_plus_student_entropy": "Student entropy + KL",
}
BASELINES: dict[str, dict[str, Any]] = {
    "Full KD": {"position_policy": "all"},
    "RandomPos": {"position_policy": "random"},
    "AT-KD": {"position_policy": "all", "divergence": "at_kd"},
}
BY_SCORE: dict[str, dict[str, Any]] = {NAMES[score]: {"position_score": score} for score in NAMES}
BY_SCORE |= {score: {"position_score": score} for score in SCORES.keys() - NAMES.keys()}  # newer than the study
BY_POLICY: dict[str, dict[str, Any]] = {
    "GLS": {"position_policy": "gls"},
    "Curriculum": {"position_policy": "curriculum"},
    "Pos RS-KD*": {"position_policy": "pos_rs_corrected"},
    "Pos RS-KD": {"position_policy": "pos_rs"},
}
METHODS = BASELINES | BY_SCORE | BY_POLICY
METRICS = {"perplexity": "PPL", "forward_kl": "KL(p‖q)", "ece": "ECE %"}


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("text", help="json, jsonl, csv or parquet files with a text column")
    parser.add_argument("--output_dir", default="runs/study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--fraction", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--eval_samples", type=int, default=64)
    parser.add_argument("--only_tables", action="store_true", help="make the tables of the runs that are there")
    options = parser.parse_args()
    settings = {k: v for k, v in vars(options).items() if k not in ("output_dir", "seeds", "methods", "only_tables")}
    check_settings(os.path.join(options.output_dir, "settings.json"), settings)
    if not options.only_tables:
        run_all(options)
    write_tables(options.output_dir, options.fraction)


def check_settings(path: str, settings: dict[str, Any]) -> None:
    """Runs in one folder must be comparable."""
    if os.path.exists(path):
        with open(path) as file:
            before = json.load(file)["settings"]
        if before != settings:
            different = {k: (before.get(k), v) for k, v in settings.items() if before.get(k) != v}
            raise SystemExit(f"{path} is of a study with other settings (before, now): {different}; use a new folder")
    write_atomically(path, json.dumps({"settings": settings, "versions": installed_versions()}, indent=2) + "\n")


def run_all(options: argparse.Namespace) -> None:
    """The runs that are not there yet, seed by seed, so that an unfinished study compares all methods."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    runs = [("Student, not distilled", {}, options.seeds[0])]
    runs += [(name, METHODS[name], seed) for seed in options.seeds for name in options.methods]
    todo = [run for run in runs if not os.path.exists(path_of(options.output_dir, run[0], run[2]))]
    train, held_out = split(options)
    for name, choices, seed in (bar := tqdm(todo, desc="study")):
        bar.set_postfix_str(f"{name}, seed {seed}")
        result = run(options, train, held_out, choices, seed, 0 if not choices else options.steps)
        write_atomically(path_of(options.output_dir, name, seed), json.dumps({"method": name, "seed": seed} | result))
        write_tables(options.output_dir, options.fraction, quiet=True)


def path_of(folder: str, name: str, seed: int) -> str:
    plain = "".join(c if c.isalnum() else "_" for c in name.replace("*", "_corrected").lower())
    return os.path.join(folder, f"{plain}_{seed}.json")


def split(options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The first tenth of the documents is held out."""
    rows = load_rows(options.text).select_columns(["text"])
    cut = len(rows) // 10
    return rows.select(range(cut, len(rows))), rows.select(range(cut))


def run(
    options: argparse.Namespace, train: Dataset, held_out: Dataset, choices: dict[str, Any], seed: int, steps: int
) -> dict[str, Any]:
    """Distil once and evaluate."""
    settings: dict[str, Any] = dict(
        output_dir=os.path.join(options.output_dir, "scratch"),
        max_length=options.max_length,
        max_prompt_length=options.max_length - 1,
        per_device_train_batch_size=options.batch,
        max_steps=max(steps, 1),
        learning_rate=options.learning_rate,
        warmup_steps=max(1, options.steps // 10),
        lr_scheduler_type="cosine",
        position_fraction=options.fraction,
        curriculum_steps=options.steps,
        seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=10**6,
    )
    args = SEKDConfig(**settings | choices)
    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(options.student)
    evaluation = prepare(held_out, tokenizer, args).take(options.eval_samples)
    trainer = SEKDTrainer(options.student, options.teacher, args, train, processing_class=tokenizer, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    if steps:
        trainer.train()
    metrics = trainer.evaluate(evaluation)
    results = {name: metrics[f"eval_{name}"] for name in (*METRICS, "reverse_kl", "student_entropy", "positions")}
    return results | {"seconds_per_step": statistics.median(clock.seconds) if clock.seconds else None}


def write_tables(folder: str, fraction: float, quiet: bool = False) -> None:
    """results.csv (every run), tables.md (mean ± standard deviation over seeds) and results.png."""
    results: dict[str, list[dict[str, Any]]] = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".json") and name != "settings.json":
            with open(os.path.join(folder, name)) as file:
                result = json.load(file)
            results.setdefault(result["method"], []).append(result)
    if not results:
        return
    before = results.get("Student, not distilled", [])[:1]
    every = [r for method in ["Student, not distilled", *METHODS] for r in results.get(method, [])]
    with open(os.path.join(folder, "results.csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(every[0]))
        writer.writeheader()
        writer.writerows(every)
    budget = f"{fraction:.0%}".replace("%", " %")
    start = ["Student, not distilled", "Full KD", "RandomPos", "AT-KD"]
    tables = {
        f"Scores, top {budget} (the paper's table 2)": start + list(BY_SCORE),
        f"Policies, student entropy, {budget} (the paper's table 3)": [*start, NAMES["student_entropy"], *BY_POLICY],
    }
    text = []
    for title, methods in tables.items():
        rows = [make_row(method, results[method]) for method in methods if method in results]
        header = ["method", *METRICS.values(), "s/step", "seeds"]
        text += [f"**{title}**", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        text += [f"| {' | '.join(row)} |" for row in rows] + [""]
        if not quiet:
            table = Table(*header, title=title, title_justify="left")
            for row in rows:
                table.add_row(*row)
            Console().print(table)
    write_atomically(os.path.join(folder, "tables.md"), "\n".join(text))
    plot(os.path.join(folder, "results.png"), {m: results[m] for m in METHODS if m in results}, budget, before)


def make_row(method: str, runs: list[dict[str, Any]]) -> list[str]:
    cells = [method]
    for metric in METRICS:
        values = [r[metric] * (100 if metric == "ece" else 1) for r in runs]
        spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.4g}{spread}")
    seconds = [r["seconds_per_step"] for r in runs if r["seconds_per_step"]]
    return [*cells, f"{statistics.median(seconds):.2f}" if seconds else "", str(len(runs))]


def plot(path: str, results: dict[str, list[dict[str, Any]]], budget: str, before: list[dict[str, Any]]) -> None:
    """One panel a metric, methods in the order of their mean KL, a dot for each seed; dashed: the student before."""
    if not results:
        return
    order = sorted(results, key=lambda m: -statistics.mean(r["forward_kl"] for r in results[m]))
    figure, axes = plt.subplots(1, len(METRICS), figsize=(13, 0.34 * len(order) + 1.4), sharey=True)
    colours = {
        **dict.fromkeys(BASELINES, "#8a8a8a"),
        **dict.fromkeys(BY_SCORE, "#2b6cb0"),
        **dict.fromkeys(BY_POLICY, "#c05621"),
    }
    for axis, (metric, label) in zip(axes, METRICS.items(), strict=True):
        factor = 100 if metric == "ece" else 1
        for y, method in enumerate(order):
            values = [r[metric] * factor for r in results[method]]
            axis.plot(
                values, [y] * len(values), "o", color=colours[method], alpha=0.45, markersize=5, markeredgewidth=0
            )
            axis.plot(statistics.mean(values), y, "|", color=colours[method], markersize=15, markeredgewidth=2.5)
        for start in before:
            axis.axvline(start[metric] * factor, color="#444444", linewidth=1, linestyle="--")
        axis.set_xlabel(label + (", nats a token" if metric == "forward_kl" else ""))
        axis.grid(axis="x", color="#dddddd", linewidth=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(order)), order)
    names = {"#8a8a8a": "baselines", "#2b6cb0": f"top {budget} by score", "#c05621": f"policies, {budget}"}
    marks = [plt.Line2D([], [], marker="o", linestyle="", color=c, label=n) for c, n in names.items()]
    marks += [plt.Line2D([], [], color="#444444", linewidth=1, linestyle="--", label="before")]
    figure.legend(handles=marks, loc="upper center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
