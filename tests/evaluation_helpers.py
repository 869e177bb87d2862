"""Small data sets of evaluation tasks, in the hub's schema, in the words of the tests' tokenizer."""

import json
import random

from helpers import words


def write_tasks(folder, items=12):
    """A folder with ARC-Easy, LAMBADA and GSM8K for ``eval_data_dir``."""
    draw = random.Random(5)
    rows = {"arc_easy": [], "lambada_openai": [], "gsm8k": []}
    for i in range(items):
        choices = {"text": [words(draw, 1, 4) for _ in range(4)], "label": [*"ABCD"]}
        question = {"id": f"q{i}", "question": words(draw, 3, 9), "choices": choices, "answerKey": "ABCD"[i % 4]}
        rows["arc_easy"].append(question)
        rows["lambada_openai"].append({"text": words(draw, 5, 12)})
        rows["gsm8k"].append({"question": words(draw, 3, 9), "answer": f"{words(draw, 2, 4)} #### {i}"})
    for task, of_task in rows.items():
        for split in ("test", "validation"):
            path = folder / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in of_task))
    return str(folder)
