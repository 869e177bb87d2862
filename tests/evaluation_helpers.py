"""Tiny models and tasks for evaluations: rows in the hub's schemas, made of the tiny tokenizer's words."""

import json
import random
from pathlib import Path

from helpers import add_lora, make_model, make_tokenizer, make_vllm_model, words

from sekd.eval.distillation import measure_distillation
from sekd.eval.distillation_data import DistillationOptions, prepare_distillation
from sekd.eval.records import TaskResult


def save_model(folder: Path, seed: int = 0, kind: str = "untied", with_tokenizer: bool = True) -> str:
    """A tiny model in a folder; kind "vllm" for one that vLLM can run."""
    model = make_vllm_model(seed) if kind == "vllm" else make_model(kind, seed)
    model.save_pretrained(folder)
    if with_tokenizer:
        make_tokenizer().save_pretrained(folder)
    return str(folder)


def save_adapter(folder: Path, base: str, model, **options) -> str:
    """An adapter of a saved model, which changes it; its folder has no tokenizer."""
    adapted = add_lora(model, **options)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder)
    return str(folder)


def make_rows(task: str, count: int, seed: int = 0) -> list[dict]:
    """Rows of a task."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        question, options = words(draw, 3, 9), [words(draw, 1, 4) for _ in range(4)]
        rows.append(
            {
                "arc_easy": {
                    "id": str(i),
                    "question": question,
                    "choices": {"text": options, "label": ["A", "B", "C", "D"]},
                    "answerKey": "ABCD"[i % 4],
                },
                "piqa": {"goal": question, "sol1": options[0], "sol2": options[1], "label": i % 2},
                "lambada_openai": {"text": words(draw, 8, 14)},
                "gsm8k": {"question": question, "answer": f"{options[0]} #### {i}"},
            }[task]
        )
    return rows


def write_tasks(folder: Path, count: int = 12) -> str:
    """A folder with rows of four tasks, as ``--data-dir`` takes it."""
    for task, split in (
        ("arc_easy", "test"),
        ("piqa", "validation"),
        ("lambada_openai", "test"),
        ("gsm8k", "test"),
        ("gsm8k", "train"),
    ):
        (folder / task).mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in make_rows(task, count, seed=len(task + split))]
        (folder / task / f"{split}.jsonl").write_text("".join(lines))
    return str(folder)


def measure(task: str, student: str, teacher: str, **options) -> TaskResult:
    """One task of the suite distillation, ``text`` or ``rollouts``, of two models by name."""
    prepared = prepare_distillation(student, DistillationOptions(teacher, **options))
    (result,) = measure_distillation(prepared, [task])
    return result
