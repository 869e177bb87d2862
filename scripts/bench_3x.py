#!/usr/bin/env python3
"""What SE-KD_3X costs and gives against Full KD: the same data once through, wall time and held-out text.

    python scripts/bench_3x.py STUDENT TEACHER 'text/*.jsonl' [--sequences 512] [--seeds 1337 1338 1339]

Full KD trains on every sequence, with the teacher in memory. SE-KD_3X scores all of them by student entropy, keeps a
fifth, lets the teacher read that fifth once into a cache, and trains from the cache on a fifth of its positions. For
each seed both are timed from the names of the models to the trained student, loading included, so a reused cache is
the last of the three phases. Then both students are evaluated on held-out sequences. Finished seeds are kept as JSON
in --output_dir, so a run that was stopped goes on.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench_table import write_figures
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback
from transformers.utils import logging
from trl import ModelConfig, ScriptArguments

from sekd import SEKDConfig, SEKDTrainer
from sekd.data.load import load_rows
from sekd.files import write_atomically
from sekd.recipe import Run

METRICS = {"perplexity": "perplexity", "forward_kl": "KL(p‖q)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("text", help="json, jsonl, csv or parquet files with a text column")
    parser.add_argument("--output_dir", default="runs/bench_3x")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sample_fraction", type=float, default=0.2)
    parser.add_argument("--position_fraction", type=float, default=0.2)
    parser.add_argument("--class_samples", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--eval_samples", type=int, default=64)
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    rows = load_rows(options.text).select_columns(["text"])
    cut = len(rows) // 10  # the first tenth of the documents is held out
    held_out, train = rows.select(range(cut)), rows.select(range(cut, len(rows)))
    results = []
    for seed in options.seeds:
        path = os.path.join(options.output_dir, f"{seed}.json")
        if not os.path.exists(path):
            os.makedirs(options.output_dir, exist_ok=True)
            write_atomically(path, json.dumps(one_seed(options, train, held_out, seed)) + "\n")
        with open(path) as file:
            results.append(json.load(file))
    rows = summarise(results)
    show(results, rows)
    write_figures(options.json, f"wall time, median of {len(results)}", rows)


def one_seed(options: argparse.Namespace, train: Dataset, held_out: Dataset, seed: int) -> dict[str, Any]:
    """Seconds of each phase, and the held-out metrics of the student before, by Full KD, and by SE-KD_3X."""
    scratch = os.path.join(options.output_dir, "scratch")
    shutil.rmtree(scratch, ignore_errors=True)
    common: dict[str, Any] = dict(
        output_dir=scratch,
        teacher_model_name_or_path=options.teacher,
        max_length=options.max_length,
        max_prompt_length=options.max_length - 1,
        sample_pool=options.sequences,
        per_device_train_batch_size=options.batch,
        num_train_epochs=1,
        learning_rate=options.learning_rate,
        warmup_steps=0.1,  # of all steps
        lr_scheduler_type="cosine",
        seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=10**6,
        max_eval_samples=options.eval_samples,
    )
    full = SEKDConfig(**common, position_policy="all")
    selective = SEKDConfig(
        **common,
        sample_fraction=options.sample_fraction,
        position_fraction=options.position_fraction,
        class_selection="rs_kd",
        class_samples=options.class_samples,
    )
    folder = os.path.join(scratch, "cache")
    cached = SEKDConfig(**{**selective.to_dict(), "teacher_cache": folder})
    script = ScriptArguments(dataset_name=options.text, dataset_train_split=f"train[{len(held_out)}:]")
    student = ModelConfig(model_name_or_path=options.student)
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - started
        print(f"seed {seed}, {name}: {seconds[name]:.1f} s", flush=True)
        return result

    def train_with(args: SEKDConfig) -> Any:
        trainer = SEKDTrainer(options.student, args=args, train_dataset=train)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)

    def evaluate(student: Any) -> dict[str, float]:
        trainer = SEKDTrainer(student, args=full, train_dataset=held_out, eval_dataset=held_out)
        trainer.remove_callback(PrinterCallback)
        metrics = trainer.evaluate()
        return {name: metrics[f"eval_{name}"] for name in METRICS}

    found = {"before": evaluate(options.student)}
    found["Full KD"] = evaluate(timed("Full KD", lambda: train_with(full)))
    timed("scoring", lambda: Run(script, selective, student).choose_samples())
    timed("construction", lambda: Run(script, cached, student).build_cache())
    found["SE-KD_3X"] = evaluate(timed("cached training", lambda: train_with(cached)))
    return {"seed": seed, "seconds": seconds, "held out": found}


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over the seeds, of the seconds and of their ratios to Full KD."""
    sums = {
        "Full KD": ["Full KD"],
        "sample scoring": ["scoring"],
        "cache construction": ["construction"],
        "SE-KD_3X, cache reused": ["cached training"],
        "SE-KD_3X in all": ["scoring", "construction", "cached training"],
    }
    rows = {}
    for label, phases in sums.items():
        seconds = [sum(r["seconds"][phase] for phase in phases) for r in results]
        ratios = [s / r["seconds"]["Full KD"] for s, r in zip(seconds, results, strict=True)]
        rows[label] = {"seconds": statistics.median(seconds), "of Full KD": statistics.median(ratios)}
    return rows


def show(results: list[dict[str, Any]], rows: dict[str, dict[str, float]]) -> None:
    """Print the times, and means of what came out."""
    times = Table("", "s", "of Full KD's", title=f"wall time, median of {len(results)}", title_justify="left")
    for label, row in rows.items():
        ratio = row["of Full KD"]
        times.add_row(label, f"{row['seconds']:.1f}", f"{ratio:.3f} (1/{1 / ratio:.1f})")
    quality = Table("", *METRICS.values(), title="held-out text, mean ± standard deviation", title_justify="left")
    for label in results[0]["held out"]:
        cells = []
        for metric in METRICS:
            values = [r["held out"][label][metric] for r in results]
            spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}")
        quality.add_row(label, *cells)
    for table in (times, quality):
        Console().print(table)


if __name__ == "__main__":
    main()
