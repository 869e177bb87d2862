"""Make the models and the data of a sweep of the study in docs/results.md.

    python scripts/prepare_study.py task runs/study/task_good --start good
    python scripts/prepare_study.py heal runs/study/heal --model HuggingFaceTB/SmolLM2-135M-Instruct \\
      --text 'text/*.jsonl'
    python scripts/prepare_study.py expert runs/study/expert --model HuggingFaceTB/SmolLM2-135M-Instruct

Each writes `teacher`, `start` (the student before), `train.jsonl`, `validation.jsonl` and `test.jsonl` into the folder,
where the sweep then runs.

`task`: the demo's word problems (4,000 to train, 500 to validate, 1,000 to test), its teacher, and a student whose
training on the answers was stopped early. Prints how many of the test problems both solve.

`expert`: the same problems; the teacher is the model after training on their answers, and the student the same model
after a few steps of it.

`heal`: the model and, as `start`, the same without five of its layers; and documents, a tenth to validate, a tenth to
test, the others to train.
"""

import argparse
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging

from sekd.cli.demo.pipeline import (
    STUDENT,
    TEACHER,
    TRAIN,
    make_model,
    make_task,
    measure_exact_match,
    train_on_answers,
)
from sekd.cli.demo.word_problems import make_problems
from sekd.data.load import load_rows
from sekd.tables import print_facts

SEED = 0
VALIDATION, TEST = 500, 1000
TEACHER_STEPS = 300
START_STEPS = {"good": 160, "poor": 100}
"""Steps of cross-entropy before the task's distillation."""
EXPERT_STEPS = {"teacher": 32, "start": 6}
"""Steps of cross-entropy of a language model."""
EXPERT_BATCH, EXPERT_RATE = 8, 2e-4
ANSWER_TOKENS = 128
"""The longest answer, in tokens of a language model."""
REMOVED = range(14, 19)
"""Layers whose removal costs the least cross-entropy on FineWeb-Edu, chosen one by one: 17, 14, 16, 18, 15."""


def prepare_task(folder: str, start: str) -> None:
    """Write the problems and the two models, and print their exact match."""
    tokenizer, train, problems = make_task(folder, SEED, VALIDATION + TEST)
    validation, test = problems[:VALIDATION], problems[VALIDATION:]
    write_rows(os.path.join(folder, "validation.jsonl"), validation)
    write_rows(os.path.join(folder, "test.jsonl"), test)
    matches = {}
    for name, size, steps in (("teacher", TEACHER, TEACHER_STEPS), ("start", STUDENT, START_STEPS[start])):
        model = make_model(tokenizer, size["hidden"], size["layers"], size["heads"], SEED)
        train_on_answers(model, tokenizer, train, steps, SEED, f"{name}: cross-entropy")
        model.save_pretrained(os.path.join(folder, name))
        tokenizer.save_pretrained(os.path.join(folder, name))
        matches[name] = f"{measure_exact_match(model, tokenizer, test):.1f} %"
    print_facts(f"exact match on {TEST} test problems", matches)


def prepare_expert(folder: str, model_name: str) -> None:
    """Write the problems and the two models, and print their exact match on the first problems of the test."""
    set_seed(SEED)
    problems = make_problems(TRAIN + VALIDATION + TEST, SEED)
    parts = {"train": problems[:TRAIN], "validation": problems[TRAIN:-TEST], "test": problems[-TEST:]}
    for name, part in parts.items():
        write_rows(os.path.join(folder, f"{name}.jsonl"), part)
    train, tokenizer = os.path.join(folder, "train.jsonl"), AutoTokenizer.from_pretrained(model_name)
    matches = {}
    for name, steps in EXPERT_STEPS.items():
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
        train_on_answers(model, tokenizer, train, steps, SEED, f"{name}: cross-entropy", EXPERT_BATCH, EXPERT_RATE)
        model.to(torch.bfloat16).save_pretrained(os.path.join(folder, name))
        tokenizer.save_pretrained(os.path.join(folder, name))
        matches[name] = f"{measure_exact_match(model, tokenizer, parts['test'][:100], ANSWER_TOKENS, 50):.1f} %"
    print_facts("exact match on 100 test problems", matches)


def prepare_heal(folder: str, model_name: str, text: str) -> None:
    """Write the model, the pruned one and the parts of the documents."""
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model.save_pretrained(os.path.join(folder, "teacher"))
    tokenizer.save_pretrained(os.path.join(folder, "teacher"))
    layers = [layer for index, layer in enumerate(model.model.layers) if index not in REMOVED]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    # Newer configurations name the kind of each layer.
    if kinds := getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for index, kind in enumerate(kinds) if index not in REMOVED]
    model.save_pretrained(os.path.join(folder, "start"))
    tokenizer.save_pretrained(os.path.join(folder, "start"))
    rows = load_rows(text).select_columns(["text"]).shuffle(SEED)
    tenth = len(rows) // 10
    for name, part in (("validation", range(tenth)), ("test", range(tenth, 2 * tenth))):
        write_rows(os.path.join(folder, f"{name}.jsonl"), rows.select(part))
    write_rows(os.path.join(folder, "train.jsonl"), rows.select(range(2 * tenth, len(rows))))
    print(f"{len(layers)} layers in {folder}/start; {len(rows)} documents, {tenth} to validate and {tenth} to test")


def write_rows(path: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("regime", choices=["task", "expert", "heal"])
    parser.add_argument("folder", help="gets the models and the data")
    parser.add_argument("--start", choices=list(START_STEPS), help="the student of `task`")
    parser.add_argument("--model", help="the language model of `expert` or `heal`")
    parser.add_argument("--text", help="the documents of `heal`: a file, or a pattern, with a column `text`")
    options = parser.parse_args()
    needed = {"task": ("start",), "expert": ("model",), "heal": ("model", "text")}[options.regime]
    for name in ("start", "model", "text"):
        if (getattr(options, name) is None) == (name in needed):
            parser.error(f"--{name} is {'needed' if name in needed else 'of no use'} for {options.regime}")
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    os.makedirs(options.folder, exist_ok=True)
    if options.regime == "task":
        prepare_task(options.folder, options.start)
    elif options.regime == "expert":
        prepare_expert(options.folder, options.model)
    else:
        prepare_heal(options.folder, options.model, options.text)


if __name__ == "__main__":
    main()
