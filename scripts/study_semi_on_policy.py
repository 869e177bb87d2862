"""Rollouts of the initial student, read by the teacher once, against live on-policy training, on the demo's task.

    python scripts/study_semi_on_policy.py [--seeds 0 1 2] [--folder runs/semi_on_policy]

Each method is its `sekd` commands, in processes of their own. Its seconds count all of them from start to end: imports,
engine, rollouts, cache, training. Processor seconds of all their processes stand beside them, for machines that also do
other things. Prints exact match on 1,000 held-out problems, its mean and standard deviation over the seeds.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping

from transformers import AutoModelForCausalLM

from sekd.cli.demo.pipeline import (
    STUDENT,
    TEACHER,
    choose_engine,
    make_model,
    make_task,
    measure_exact_match,
    train_on_answers,
)

HELD_OUT = 1000
LIVE = [["train"]]
SEMI = [["rollouts"], ["cache", "build"], ["train"]]
CACHED = {"lmbda": "0", "divergence": "forward_kl", "class_selection": "rs_kd", "max_length": "160"}
METHODS: dict[str, tuple[list[list[str]], dict[str, str]]] = {
    "Full KD, live": (LIVE, {"position_policy": "all"}),
    "SE-KD 20 %, live": (LIVE, {}),
    "SE-KD 20 %, live, forward KL": (LIVE, {"divergence": "forward_kl"}),
    "SE-KD_3X, semi-on-policy": (SEMI, {**CACHED, "sample_fraction": "0.2"}),
    "SE-KD 20 % + RS-KD, semi-on-policy": (SEMI, CACHED),
}
"""Name -> its commands, and the keys that it changes in recipes/demo.yaml."""


def make_pair(folder: str, seed: int) -> None:
    """The demo's teacher and student, in ``folder``."""
    tokenizer, data, _ = make_task(folder, seed, HELD_OUT)
    for name, size in (("teacher", TEACHER), ("student", STUDENT)):
        model = make_model(tokenizer, size["hidden"], size["layers"], size["heads"], seed)
        train_on_answers(model, tokenizer, data, size["steps"], seed, name)
        model.save_pretrained(os.path.join(folder, name))
        tokenizer.save_pretrained(os.path.join(folder, name))


def run_method(name: str, folder: str, pair: str, seed: int, learning_rate: float) -> tuple[str, dict[str, float]]:
    """Run a method. Returns the folder of its student, and the seconds of each command and of all processors."""
    commands, changes = METHODS[name]
    shutil.rmtree(folder, ignore_errors=True)
    keys = {
        "model_name_or_path": os.path.join(pair, "student"),
        "teacher_model_name_or_path": os.path.join(pair, "teacher"),
        "dataset_name": os.path.join(pair, "train.jsonl"),
        "output_dir": os.path.join(folder, "run"),
        "rollout_engine": choose_engine(),
        "seed": str(seed),
        "learning_rate": str(learning_rate),
        **changes,
    }
    if commands is SEMI:
        keys |= {"rollouts": os.path.join(folder, "rollouts.jsonl"), "teacher_cache": os.path.join(folder, "cache")}
    flags = [part for key, value in keys.items() for part in (f"--{key}", value)]
    seconds, before = {}, count_processor_seconds()
    for command in commands:
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "sekd.cli", *command, "demo", *flags], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"sekd {' '.join(command)} failed:\n{done.stderr[-3000:]}")
        seconds[command[0]] = time.monotonic() - started
    return keys["output_dir"], {**seconds, "processor": count_processor_seconds() - before}


def count_processor_seconds() -> float:
    """The processor seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def describe(values: list[float]) -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--folder", default="runs/semi_on_policy")
    options = parser.parse_args()
    matches: dict[str, dict[float, list[float]]] = {name: {} for name in options.methods}
    seconds: dict[str, list[Mapping[str, float]]] = {name: [] for name in options.methods}
    references: dict[str, list[float]] = {"teacher": [], "student": []}
    for seed in options.seeds:
        pair = os.path.join(options.folder, f"pair_{seed}")
        make_pair(pair, seed)
        tokenizer, _, held_out = make_task(pair, seed, HELD_OUT)

        def measure(path: str, tokenizer: object = tokenizer, held_out: list = held_out) -> float:
            return measure_exact_match(AutoModelForCausalLM.from_pretrained(path), tokenizer, held_out)

        for name, values in references.items():
            values.append(measure(os.path.join(pair, name)))
        for name in options.methods:
            for rate in options.learning_rates:
                student, of_commands = run_method(name, os.path.join(options.folder, "method"), pair, seed, rate)
                matches[name].setdefault(rate, []).append(measure(student))
                seconds[name].append(of_commands)
                print(f"seed {seed}, {name}, learning rate {rate:g}: {matches[name][rate][-1]:.1f} %", flush=True)
    print("\n| method | learning rate | exact match, % | seconds | rollouts, cache, training | processor seconds |")
    print("|---|---|---|---|---|---|")
    for name, values in references.items():
        print(f"| {name} | – | {describe(values)} | – | – | – |")
    for name, by_rate in matches.items():
        medians = {part: statistics.median(run[part] for run in seconds[name]) for part in seconds[name][0]}
        processor = medians.pop("processor")
        parts = ", ".join(f"{value:.0f}" for value in medians.values())
        for rate, values in by_rate.items():
            total = sum(medians.values())
            print(f"| {name} | {rate:g} | {describe(values)} | {total:.0f} | {parts} | {processor:.0f} |")


if __name__ == "__main__":
    main()
