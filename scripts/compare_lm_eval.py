#!/usr/bin/env python3
"""Does `sekd evaluate` give the numbers of lm-eval's own command, item by item? And do the backends agree?

    python scripts/compare_lm_eval.py MODEL --data-dir data/eval data/gsm8k --tasks arc_easy piqa --output compared
    python scripts/compare_lm_eval.py MODEL --data-dir data/eval --tasks arc_easy --limit 200 --backends hf vllm

lm-eval's command reads the same files: a YAML file includes that of its task and names them. It runs with transformers
in float32, zero-shot, in batches of 16. sekd runs each of --backends with the same settings. What is done is kept in
--output, so the same command resumes after an interruption. The table has, for each task and backend, the number of
items that lm-eval's command scores otherwise (each score of lm-eval counts), the largest difference of a log-likelihood
in nats, and the number of generated outputs that differ.
"""

import argparse
import glob
import json
import os
import subprocess
import sys
from typing import Any

import lm_eval.tasks
import yaml
from rich.table import Table

from sekd.eval.ifeval import has_punkt
from sekd.eval.prepared import TaskOptions, prepare_task
from sekd.eval.records import Item
from sekd.eval.result_files import find_done, fingerprint_model, load_results, name_folder
from sekd.eval.task_data import find_file
from sekd.eval.tasks import TASKS
from sekd.tables import print_table

BATCH = "16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a folder or hub id")
    parser.add_argument("--data-dir", nargs="+", required=True, metavar="DIR")
    parser.add_argument(
        "--tasks", nargs="+", required=True, choices=[n for n, s in TASKS.items() if s.grade is None or n == "gsm8k"]
    )
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--backends", nargs="+", default=["hf"], choices=["hf", "vllm"])
    parser.add_argument("--output", default="compared")
    options = parser.parse_args()

    table = Table(title=f"{options.model}, against lm-eval's own command")
    for column in ("task", "backend", "items", "scored otherwise", "largest difference", "other outputs"):
        table.add_column(column, justify="left" if column in ("task", "backend") else "right")
    for task in options.tasks:
        reference = run_lm_eval(options, task)
        for backend in options.backends:
            ours = run_sekd(options, task, backend)
            table.add_row(task, backend, *compare(ours, reference))
    print_table(table)


def run_lm_eval(options: argparse.Namespace, task: str) -> dict[int, dict[str, Any]]:
    """What lm-eval's command gives for each item: its scores by name, and its responses."""
    folder = os.path.join(options.output, "lm_eval", f"{task}-{options.limit}-{options.max_new_tokens}")
    if not glob.glob(f"{folder}/**/samples_*.jsonl", recursive=True):
        spec = TASKS[task]
        file = find_file(task, spec.split, options.data_dir)
        assert isinstance(spec.config, str)
        config = {
            "include": os.path.join(os.path.dirname(lm_eval.tasks.__file__), spec.config),
            "task": f"local_{task}",
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {spec.split: os.path.abspath(str(file))}},
            **dict.fromkeys(("training_split", "fewshot_split", "validation_split")),
            "test_split": spec.split,
        }
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "task.yaml"), "w") as out:
            yaml.safe_dump(config, out)
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", BATCH]
        command += ["--model_args", f"pretrained={options.model},dtype=float32", "--num_fewshot", "0", "--log_samples"]
        command += ["--tasks", f"local_{task}", "--include_path", folder, "--output_path", os.path.join(folder, "out")]
        command += [] if options.limit is None else ["--limit", str(options.limit)]
        command += ["--gen_kwargs", f"max_gen_toks={options.max_new_tokens}"] if is_generated(options, task) else []
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True, env=os.environ | {"NLTK_DATA": make_punkt(options.output)})
    items: dict[int, dict[str, Any]] = {}
    with open(glob.glob(f"{folder}/**/samples_*.jsonl", recursive=True)[0]) as lines:
        for line in lines:
            sample = json.loads(line)
            suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
            item = items.setdefault(sample["doc_id"], {"scores": {}, "responses": sample["resps"]})
            item["scores"] |= {name + suffix: sample[name] for name in sample["metrics"]}
    return items


def make_punkt(output: str) -> str:
    """A folder for NLTK_DATA with an untrained punkt, which lm-eval's command needs to start with ifeval.

    Only where punkt itself is missing. sekd skips the items whose rules need punkt there, so they are not compared.
    """
    if has_punkt():
        return os.environ.get("NLTK_DATA", "")
    folder = os.path.join(os.path.abspath(output), "nltk_data")
    language = os.path.join(folder, "tokenizers", "punkt_tab", "english")
    os.makedirs(language, exist_ok=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        open(os.path.join(language, name), "w").close()
    return folder


def make_options(options: argparse.Namespace) -> TaskOptions:
    return TaskOptions(limit=options.limit, data_dirs=tuple(options.data_dir), max_new_tokens=options.max_new_tokens)


def is_generated(options: argparse.Namespace, task: str) -> bool:
    return prepare_task(task, None, make_options(options)).generated


def run_sekd(options: argparse.Namespace, task: str, backend: str) -> list[Item]:
    """The items of ``sekd evaluate``, which skips what is done."""
    command = [sys.executable, "-m", "sekd.cli", "evaluate", options.model, "--tasks", task, "--backend", backend]
    command += ["--data-dir", *options.data_dir, "--dtype", "float32", "--output", options.output]
    command += ["--max-new-tokens", str(options.max_new_tokens)] + (["--batch-size", BATCH] if backend == "hf" else [])
    command += [] if options.limit is None else ["--limit", str(options.limit)]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)
    folder = name_folder(options.output, options.model)
    settings = prepare_task(task, None, make_options(options)).settings | {"backend": backend, "dtype": "float32"}
    done = find_done(folder, fingerprint_model(options.model), task, settings)
    if done is None:
        raise ValueError(f"{folder} has {', '.join(load_results(folder))}, and nothing of {task} with {settings}")
    return done.items


def compare(ours: list[Item], reference: dict[int, dict[str, Any]]) -> list[str]:
    """The columns of a row: items, items with another score, the largest difference, and other outputs."""
    others, largest, outputs = 0, 0.0, 0
    for item in ours:
        expected = reference[item.index]
        scores = {name: float(v) for name, v in expected["scores"].items() if isinstance(v, bool | int | float)}
        others += any(item.metrics.get(name, value) != value for name, value in scores.items())
        if item.loglikelihoods:
            values = [float(r[0][0]) if isinstance(r[0], list) else float(r[0]) for r in expected["responses"]]
            largest = max([largest, *(abs(a - b) for a, b in zip(item.loglikelihoods, values, strict=True))])
        else:
            outputs += item.outputs[0] != expected["responses"][0][0]
    return [str(len(ours)), str(others), f"{largest:.1e}", str(outputs)]


if __name__ == "__main__":
    main()
