"""How a result is named by its settings."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sekd.eval.records import TaskResult
from sekd.eval.tasks import TASKS

LABELS: dict[str, tuple[tuple[Any, ...], str]] = {
    "shots": ((None, 0), "{} shots"),
    "limit": ((None,), "limit {}"),
    "seed": ((None, 0), "seed {}"),
    "repeats": ((None, 1), "{} repeats"),
    "temperature": ((None, 0.0, 1.0), "temperature {}"),
    "top_p": ((None, 1.0), "top_p {}"),
    "chat_template": ((None, False), "chat template"),
}
"""Settings that stand in the name of a result: the values that are left out, and how another one is written."""
COMMON: dict[str, tuple[tuple[Any, ...], str]] = {
    "limit": ((None,), "limit {}"),
    "shots": ((), "{} shots"),
    "chat_template": ((), "chat template {}"),
    "use_chat_template": ((), "chat template {}"),
    "repeats": ((1,), "{} repeats"),
    "temperature": ((0.0,), "temperature {}"),
    "top_p": ((1.0,), "top_p {}"),
    "seed": ((), "seed {}"),
    "backend": ((), "backend {}"),
    "dtype": ((), "{}"),
    "teacher_bits": ((), "teacher in {} bits"),
    "arguments": ((), "arguments {}"),
}
"""The settings that stand below the table where all rows agree: the values that are left out, and how others look."""

OWN_SPLITS = {"text": "train", "rollouts": "train"}
"""The usual splits of the tasks of the suite distillation; that of lm-eval's other tasks is ``test``."""


def label_result(result: TaskResult, left_out: Collection[str] = ()) -> str:
    """The task of a result, with its :func:`list_details`, such as ``gsm8k (train[:500], limit 200)``."""
    details = list_details(result.task, result.settings, left_out)
    return f"{result.task} ({', '.join(details)})" if details else result.task


def list_details(task: str, settings: Mapping[str, Any], left_out: Collection[str] = ()) -> list[str]:
    """The split of a result unless it is the task's own, and its unusual ``LABELS`` but for those ``left_out``."""
    usual_split = TASKS[task].split if task in TASKS else OWN_SPLITS.get(task, "test")
    split = settings.get("split")
    return ([str(split)] if split not in (None, usual_split) else []) + [
        form.format(settings[name])
        for name, (usual, form) in LABELS.items()
        if name not in left_out and settings.get(name) not in usual
    ]


def find_common(results: Iterable[TaskResult]) -> dict[str, Any]:
    """The settings of ``COMMON`` that are the same in all results that have them."""
    settings = [result.settings for result in results]
    values = {name: [of_result[name] for of_result in settings if name in of_result] for name in COMMON}
    return {name: given[0] for name, given in values.items() if given and all(value == given[0] for value in given)}


def describe_common(settings: Mapping[str, Any]) -> list[str]:
    """What stands below the table of common settings: one text for each, without those of usual values."""
    texts = [
        form.format(write_value(settings[name]))
        for name, (usual, form) in COMMON.items()
        if name in settings and settings[name] not in usual
    ]
    return [*dict.fromkeys(texts)]


def write_value(value: Any) -> str:
    """The value of a setting as a reader sees it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)
