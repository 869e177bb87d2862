"""The rows of a task: from local files, or from the hub."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from datasets import Dataset

from sekd.data.load import BUILDERS, load_rows
from sekd.eval.tasks import TASKS, TaskSpec

KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str) and value != "",
    "text or empty": lambda value: isinstance(value, str),
    "number": lambda value: isinstance(value, int) or (isinstance(value, str) and value.isdecimal()),
    "text or number": lambda value: isinstance(value, int | float) or (isinstance(value, str) and value != ""),
    "texts": lambda value: isinstance(value, list) and value != [] and all(isinstance(v, str) for v in value),
    "records": lambda value: isinstance(value, list) and all(isinstance(v, dict | None) for v in value),
}
"""The kinds of values in a column of a schema, and whether a value is of the kind."""


def find_file(task: str, split: str, data_dirs: Sequence[str]) -> str | None:
    """The file of a split in the first folder that has it: DIR/TASK/SPLIT.*, or DIR/SPLIT.* in a folder named TASK."""
    for folder in data_dirs:
        for place in _list_places(task, folder):
            for extension in BUILDERS:
                if os.path.isfile(path := os.path.join(place, split + extension)):
                    return path
    return None


def _list_places(task: str, folder: str) -> list[str]:
    folder = os.path.expanduser(folder)
    inside = os.path.basename(os.path.abspath(folder)) == task
    return [os.path.join(folder, task), *([folder] if inside else [])]


def load_task_rows(
    task: str, split: str, data_dirs: Sequence[str] = (), hub: tuple[str, str | None] = ("", None)
) -> Dataset:
    """The rows of a split, such as ``test`` or ``train[:500]``, of a task.

    With ``data_dirs`` they come from there alone, else from the dataset ``hub``: its name and its configuration (by
    default that of ``TASKS``). Every value of a task in ``TASKS`` is checked.

    Raises:
        ValueError: a folder or file is missing or damaged, the hub has no such dataset or cannot be reached, a column
            or value is not as in the schema, or the split has no rows. The error names the file, the schema, and the
            dataset of the hub that has it.
    """
    spec = TASKS.get(task)
    dataset, config = spec.hub if spec else hub
    if missing := [d for d in data_dirs if not os.path.isdir(os.path.expanduser(d))]:
        raise ValueError(f"data_dir {missing[0]!r}: no such folder")
    whole = split.partition("[")[0]
    if not re.fullmatch(r"\w+(\[-?\d*%?:-?\d*%?\])?", split):
        raise ValueError(f"{task}: split {split!r} is not like 'test' or 'train[:500]'")
    source = find_file(task, whole, data_dirs) if data_dirs else dataset
    if source is None:
        folder = next((d for d in data_dirs if os.path.basename(os.path.abspath(d)) not in TASKS), data_dirs[0])
        expected = os.path.join(folder, task, f"{whole}.jsonl")
        others = ", ".join(kind for kind in BUILDERS if kind != ".jsonl")
        raise ValueError(f"{task}: no file {expected} (or {others}); {_describe(spec, dataset, config)}")
    try:
        rows = load_rows(source, None if data_dirs else config, split, field=f"{task}:")
    except ValueError as error:
        message = str(error) if source in str(error) else f"{task}: {source}: {error}"
        remedy = "" if data_dirs else "; or name a folder that has them, with --data-dir (or eval_data_dir)"
        raise ValueError(f"{message}; {_describe(spec, dataset, config)}{remedy}") from error
    if not len(rows):
        raise ValueError(f"{task}: split {split!r} of {source} has no rows")
    if spec:
        _check_rows(task, source, rows, spec)
    return rows


def _describe(spec: TaskSpec | None, dataset: str, config: str | None) -> str:
    columns = f"each row has {', '.join(f'{name} ({kind})' for name, kind in spec.columns.items())}; " if spec else ""
    name = f"{dataset} ({config})" if config not in (None, "default") else dataset
    return f"{columns}the hub has these rows as {name}"


def _check_rows(task: str, source: str, rows: Dataset, spec: TaskSpec) -> None:
    """Raise a ValueError that names the first row that is not as in the schema, or cannot be scored."""
    for i, row in enumerate(rows):
        for column, kind in spec.columns.items():
            if not KINDS[kind](_get(row, column)):
                value = json.dumps(_get(row, column), default=str)
                value = value if len(value) <= 60 else value[:57] + "..."
                raise ValueError(
                    f"{task}: {source}, row {i + 1}: {column} is {value} and must be of the kind {kind!r}; "
                    f"{_describe(spec, *spec.hub)}"
                )
        if problem := spec.find_problem(row):
            raise ValueError(f"{task}: {source}, row {i + 1}: {problem}; mend the row, or name another split")


def _get(row: Any, column: str) -> Any:
    for name in column.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


def hash_rows(rows: Iterable[dict[str, Any]], columns: Iterable[str] = ()) -> str:
    """A hash of rows, 12 hexadecimal digits: the same for the same values in any kind of file and on the hub.

    Only ``columns`` count, or all without any. A column or a key of a record counts as absent where its value is None.
    Other values count as their text: 3 is "3", but not 3.0, and "" is a value.
    """
    top = {column.partition(".")[0] for column in columns}
    digest = hashlib.sha256()
    for row in rows:
        kept = _drop_none({name: value for name, value in row.items() if not top or name in top})
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:12]


def _drop_none(value: Any) -> Any:
    """A value without the None that datasets puts where records of one column have different keys; 3 is "3"."""
    if isinstance(value, dict):
        return {k: _drop_none(v) for k, v in value.items() if v is not None}
    return [_drop_none(v) for v in value] if isinstance(value, list) else str(value)
