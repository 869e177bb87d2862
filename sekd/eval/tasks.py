"""Which tasks and suites exist, and what lm-eval must be told of each."""

import difflib
import functools
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sekd.eval.answers import check_grader, grade_math
from sekd.eval.ifeval import find_unknown_instruction, load_rules, score_instructions


@dataclass(frozen=True)
class TaskSpec:
    """What the rest of the code knows of a task.

    Attributes:
        config: lm-eval's YAML file of the task, in its folder of tasks; or the whole configuration.
        hub: the dataset on the hub, and its configuration there.
        split: what is evaluated unless the user names another split.
        shots_split: where few-shot examples come from; None if the task has none.
        columns: the schema: each column, and a column inside of it after a dot, with the kind of its values (see
            ``task_data.KINDS``).
        main: the score that averages and comparisons show.
        grade: whether an output is right, given the answer; then the main score is the share of right outputs.
        score: replaces lm-eval's scores of a row's outputs; returns the scores, and why the row is skipped or None.
        find_problem: what is wrong with a row whose columns are as in the schema, or None.
        setup: called before lm-eval reads ``config``; raises a ValueError if a package is missing or does not work.
    """

    config: str | dict[str, Any]
    hub: tuple[str, str | None]
    split: str
    shots_split: str | None
    columns: dict[str, str]
    main: str = "acc"
    grade: Callable[[str, str], bool] | None = None
    score: Callable[[dict[str, Any], Sequence[str]], tuple[dict[str, Any], str | None]] | None = None
    find_problem: Callable[[dict[str, Any]], str | None] = lambda row: None
    setup: Callable[[], None] | None = None


@dataclass(frozen=True)
class Suite:
    """Tasks that are evaluated together.

    Attributes:
        tasks: the tasks, each with its split; None for the task's own.
        means: the scores of the suite: each is the mean of these scores of its tasks.
    """

    tasks: dict[str, str | None]
    means: dict[str, dict[str, str]]


DISTILLATION = "distillation"
"""The suite that no task of lm-eval is in: the distance from a teacher (``sekd.eval.distillation``)."""


def _score_nothing(row: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
    return {}


def _check_lettered(row: dict[str, Any]) -> str | None:
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    if len(labels) != len(texts):
        return f"choices have {len(texts)} texts and {len(labels)} labels"
    return None if row["answerKey"] in labels else f"answerKey {row['answerKey']!r} is not among the labels {labels}"


def _check_numbered(row: dict[str, Any], choices: int) -> str | None:
    return None if 0 <= int(row["label"]) < choices else f"label {row['label']} is none of the {choices} choices"


def _check_number(answer: Any) -> str | None:
    text = str(answer).rsplit("####", 1)[-1]
    return None if any(c.isdecimal() for c in text) else f"answer {text.strip()!r} has no number"


ARC_COLUMNS = {"question": "text", "choices.text": "texts", "choices.label": "texts", "answerKey": "text"}
STOPS = ["Question:", "</s>", "<|im_end|>"]
"""Where lm-eval cuts the answers to GSM8K."""

TASKS: dict[str, TaskSpec] = {
    "arc_easy": TaskSpec(
        config="arc/arc_easy.yaml",
        hub=("allenai/ai2_arc", "ARC-Easy"),
        split="test",
        shots_split="train",
        columns=ARC_COLUMNS,
        find_problem=_check_lettered,
    ),
    "arc_challenge": TaskSpec(
        config="arc/arc_challenge.yaml",
        hub=("allenai/ai2_arc", "ARC-Challenge"),
        split="test",
        shots_split="train",
        columns=ARC_COLUMNS,
        find_problem=_check_lettered,
    ),
    "hellaswag": TaskSpec(
        config="hellaswag/hellaswag.yaml",
        hub=("Rowan/hellaswag", None),
        split="validation",
        shots_split="train",
        columns={
            "activity_label": "text",
            "ctx_a": "text",
            "ctx_b": "text or empty",
            "endings": "texts",
            "label": "number",
        },
        find_problem=lambda row: _check_numbered(row, len(row["endings"])),
    ),
    "piqa": TaskSpec(
        config="piqa/piqa.yaml",
        hub=("baber/piqa", None),
        split="validation",
        shots_split="train",
        columns={"goal": "text or empty", "sol1": "text or empty", "sol2": "text or empty", "label": "number"},
        find_problem=lambda row: _check_numbered(row, 2),
    ),
    "lambada_openai": TaskSpec(
        config="lambada/lambada_openai.yaml",
        hub=("EleutherAI/lambada_openai", "default"),
        split="test",
        shots_split=None,
        columns={"text": "text"},
    ),
    "gsm8k": TaskSpec(
        config="gsm8k/gsm8k.yaml",
        hub=("openai/gsm8k", "main"),
        split="test",
        shots_split="train",
        columns={"question": "text", "answer": "text"},
        find_problem=lambda row: _check_number(row["answer"]),
        main="math_verify",
        grade=grade_math,
        setup=check_grader,
    ),
    "svamp": TaskSpec(
        config={
            "task": "svamp",
            "output_type": "generate_until",
            "training_split": "train",
            "fewshot_split": "train",
            "test_split": "test",
            "doc_to_text": "Question: {{Body}} {{Question}}\nAnswer:",
            "doc_to_target": "{{Answer}}",
            "process_results": _score_nothing,
            "metric_list": [],
            "generation_kwargs": {"until": STOPS, "do_sample": False, "temperature": 0.0},
            "metadata": {"version": 1.0},
        },
        hub=("ChilleD/SVAMP", None),
        split="test",
        shots_split="train",
        columns={"Body": "text", "Question": "text", "Answer": "text or number"},
        find_problem=lambda row: _check_number(row["Answer"]),
        main="math_verify",
        grade=grade_math,
        setup=check_grader,
    ),
    "aime25": TaskSpec(
        config="aime/aime25.yaml",
        hub=("math-ai/aime25", None),
        split="test",
        shots_split=None,
        columns={"problem": "text", "answer": "text or number"},
        find_problem=lambda row: _check_number(row["answer"]),
        main="math_verify",
        grade=grade_math,
        setup=check_grader,
    ),
    "ifeval": TaskSpec(
        config="ifeval/ifeval.yaml",
        hub=("google/IFEval", None),
        split="train",
        shots_split=None,
        columns={"key": "number", "prompt": "text", "instruction_id_list": "texts", "kwargs": "records"},
        main="prompt_level_strict_acc",
        score=score_instructions,
        find_problem=find_unknown_instruction,
        setup=load_rules,
    ),
}

SUITES: dict[str, Suite] = {
    "paper": Suite(
        tasks={
            "hellaswag": "validation",
            "piqa": "validation",
            "arc_easy": "test",
            "gsm8k": "test",
            "lambada_openai": "test",
            "ifeval": "train",
        },
        means={
            "accuracy": {
                "hellaswag": "acc",
                "piqa": "acc",
                "arc_easy": "acc",
                "gsm8k": "math_verify",
                "lambada_openai": "acc",
            },
            "ece": {"hellaswag": "ece", "piqa": "ece", "arc_easy": "ece"},
            "perplexity": {"lambada_openai": "perplexity"},
            "ifeval": {"ifeval": "prompt_level_strict_acc"},
        },
    ),
    "validation": Suite(
        tasks={
            "arc_easy": "validation",
            "gsm8k": "train[7000:]",
            "hellaswag": "train[:2000]",
            "piqa": "train[:2000]",
        },
        means={
            "accuracy": {"arc_easy": "acc", "gsm8k": "math_verify", "hellaswag": "acc", "piqa": "acc"},
            "ece": {"arc_easy": "ece", "hellaswag": "ece", "piqa": "ece"},
        },
    ),
}
"""Suites by name. ``validation`` shares no row with ``paper``."""


def resolve_tasks(names: Iterable[str]) -> list[tuple[str, str | None]]:
    """The tasks that the names mean, each with its split, in their order and without repetition.

    A name is a suite, a task of ``TASKS``, or a task, group or tag of lm-eval. ``@`` and a split may follow a task:
    ``gsm8k@train[:500]``. The split is None for lm-eval's own choice.

    Raises:
        ValueError: an unknown name, with the nearest known ones; a split after a suite; no names.
    """
    tasks: list[tuple[str, str | None]] = []
    for name in names:
        task, _, split = name.partition("@")
        if task in SUITES:
            if split:
                raise ValueError(f"{name!r}: a suite has the splits of its tasks; name a task before @")
            tasks += SUITES[task].tasks.items()
        elif task in TASKS:
            tasks.append((task, split or TASKS[task].split))
        else:
            tasks += [(leaf, split or None) for leaf in _expand(task)]
    if not tasks:
        raise ValueError(
            f"no task is named; the suites are {', '.join([*SUITES, DISTILLATION])}, the tasks {', '.join(TASKS)}"
        )
    return list(dict.fromkeys(tasks))


@functools.cache
def index_lm_eval() -> dict[str, Any]:
    """lm-eval's tasks, groups and tags by name. It reads all its files, which takes some seconds."""
    check_lm_eval()
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def check_lm_eval() -> None:
    """Raise a ValueError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("evaluation needs lm-eval, which is not installed: pip install 'sekd[eval]'")


def _expand(name: str) -> list[str]:
    """The names of the tasks that a task, a group or a tag of lm-eval means."""
    index = index_lm_eval()
    if name not in index:
        near = difflib.get_close_matches(name, [*SUITES, *TASKS], n=3, cutoff=0.5)
        near = [*difflib.get_close_matches(name, [DISTILLATION], cutoff=0.5), *near]
        near += [n for n in difflib.get_close_matches(name, index, n=5) if n not in near]
        known = f"; nearest are {', '.join(near)}" if near else ""
        raise ValueError(
            f"unknown suite or task {name!r}{known}. Suites: {', '.join([*SUITES, DISTILLATION])}; tasks: "
            f"{', '.join(TASKS)}, and those of lm-eval"
        )
    entry = index[name]
    if entry.yaml_path is None:  # a tag
        members = sorted(entry.tags)
    elif isinstance(members := entry.cfg["task"], str):
        return [name]
    if changed := [m for m in members if not isinstance(m, str)]:
        raise ValueError(f"lm-eval's group {name!r} changes settings of its tasks ({changed[0]}); name the tasks")
    return [task for member in members for task in _expand(member)]
