"""The results of a model in files: ``results.json`` with its scores, ``samples.parquet`` with one row an item."""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import textwrap
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from fnmatch import fnmatch
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sekd.eval.labels import list_details
from sekd.eval.records import BINS, Item, Score, TaskResult
from sekd.files import DamagedFile, hash_quickly, lock_folder, sync, write_atomically
from sekd.pretrained import check_model_name, find_adapter
from sekd.versions import installed_versions

logger = logging.getLogger(__name__)
RESULTS, SAMPLES = "results.json", "samples.parquet"
SCHEMA = pa.schema(
    {
        "task": pa.string(),
        "index": pa.int64(),
        "prompt": pa.string(),
        "answer": pa.string(),
        "outputs": pa.list_(pa.string()),
        "correct": pa.float64(),
        "loglikelihoods": pa.list_(pa.float64()),
        "weight": pa.float64(),
        "calibration": pa.list_(pa.list_(pa.float64())),
        "skipped": pa.string(),
        "saved": pa.string(),
    }
)
"""The columns of ``samples.parquet``. A column ``metric_NAME`` for each metric follows."""
METRIC = "metric_"
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
    "adapter_model*",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "*.py",
)
"""The files of a folder that make its model; a run's folder has others, which change while it trains."""


def name_folder(output: str, model: str) -> str:
    """The folder of a model's results in ``output``: no two models share one.

    A hub id is written with ``--`` for its slash. The name of a local folder is followed by a hash of its path, seen
    from ``output``, so that both may be moved together.
    """
    if not os.path.isdir(model):
        return os.path.join(output, re.sub(r"[^\w.-]", "_", model.replace("/", "--")))
    path = os.path.abspath(model)
    parts = path.strip(os.sep).split(os.sep)
    name = "--".join(parts[-2:] if parts[-1].startswith("checkpoint-") else parts[-1:])
    code = hashlib.sha256(os.fsencode(os.path.relpath(path, os.path.abspath(output)))).hexdigest()[:8]
    return os.path.join(output, re.sub(r"[^\w.-]", "_", name) + "-" + code)


@contextlib.contextmanager
def own_folder(folder: str) -> Iterator[None]:
    """Let this process alone write results into a folder: hold it from the first :func:`find_done` to the last save.

    Raises:
        ValueError: another process has it.
    """
    with lock_folder(
        folder, ValueError(f"another process writes results into {folder!r}: wait, or name another --output")
    ):
        yield


def fingerprint_model(model: str, revision: str | None = None) -> str:
    """What tells models apart: the commit of a hub model, or a hash of a local model's files.

    The hash reads every byte of the files in ``MODEL_FILES``, so that no change of a weight goes unseen. It takes some
    seconds for a model of 16 GB. The base of an adapter counts too.

    Raises:
        ValueError: there is no such model, or its adapter is invalid.
    """
    check_model_name("model", model)
    adapter = find_adapter(model, revision)
    code = _hash_files(model) if os.path.isdir(model) else _find_commit(model, revision, adapter is not None)
    if adapter is None:
        return code
    return f"{code}+{fingerprint_model(str(adapter.base_model_name_or_path), adapter.revision)}"


def _find_commit(model: str, revision: str | None, is_adapter: bool) -> str:
    from transformers.utils import cached_file, extract_commit_hash

    try:
        path = cached_file(model, "adapter_config.json" if is_adapter else "config.json", revision=revision or "main")
    except (OSError, ValueError) as error:
        reason = textwrap.shorten(str(error), 160, placeholder=" ...")
        raise ValueError(f"model {model!r}: no such folder, and the hub does not give its commit: {reason}") from error
    return str(extract_commit_hash(path, None))


def _hash_files(folder: str) -> str:
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if not os.path.isfile(path) or not any(fnmatch(name, pattern) for pattern in MODEL_FILES):
            continue
        digest.update(json.dumps([name, os.path.getsize(path), hash_quickly(path)]).encode())
    return digest.hexdigest()[:16]


def save_result(folder: str, model: dict[str, Any], result: TaskResult) -> str:
    """Save the result of a task, beside the others of the same model; returns the name that it has there.

    A result of the same task and the same settings is replaced. Another setting makes another result: ``gsm8k`` and
    ``gsm8k (5 shots)`` both stay. Results of a model with another fingerprint are dropped, with a warning.

    A process may be killed at any time: the samples are written first, with the previous ones still there, and a
    result counts once ``results.json`` names it. The caller holds :func:`own_folder`.

    Args:
        folder: the model's folder; made if it is missing.
        model: ``name``, ``fingerprint``, and whatever else describes the model.
        result: the result of one task.
    """
    os.makedirs(folder, exist_ok=True)
    entries, rows = _read_for_saving(folder, model)
    name = name_result(result.task, result.settings, entries)
    saved = uuid.uuid4().hex[:16]
    entry = {
        "task": result.task,
        "main": result.main,
        "scores": {score: _without_nan(asdict(value)) for score, value in result.scores.items()},
        "settings": _as_json(result.settings),
        "seconds": result.seconds,
        "items": len(result.items),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": installed_versions(),
        "saved": saved,
    }
    replaced = entries.get(name)
    tables = [_keep(rows, [other["saved"] for other in entries.values()]), _as_table(name, saved, result.items)]
    rows = pa.concat_tables([table for table in tables if table is not None], promote_options="default")
    _write_rows(folder, rows)
    entries = {**entries, name: entry}
    content = {"model": _as_json(model), "results": entries}
    write_atomically(os.path.join(folder, RESULTS), json.dumps(content, indent=2) + "\n")
    if replaced is not None:
        _write_rows(folder, _keep(rows, [other["saved"] for other in entries.values()]))
    return name


def load_results(folder: str) -> dict[str, TaskResult]:
    """All results of a model, by the names that :func:`save_result` gave; none if the folder has none.

    Raises:
        DamagedFile: a file is damaged, or does not have the samples of a result.
    """
    content = _read_content(folder)
    if content is None:
        return {}
    rows = _read_rows(folder)
    return {name: _as_result(folder, entry, rows) for name, entry in content["results"].items()}


def find_done(folder: str, fingerprint: str, task: str, settings: dict[str, Any]) -> TaskResult | None:
    """The result of this task with these settings and this model, if the folder has it whole; else None.

    A damaged file is no error: a warning names it, and the task counts as not done.
    """
    try:
        content = _read_content(folder)
        if content is None or content["model"].get("fingerprint") != fingerprint:
            return None
        for entry in content["results"].values():
            if entry["task"] == task and entry["settings"] == _as_json(settings):
                return _as_result(folder, entry, _read_rows(folder, entry["saved"]))
    except DamagedFile as error:
        logger.warning(f"{error}; {task} is evaluated again")
    return None


def name_result(task: str, settings: dict[str, Any], entries: dict[str, Any]) -> str:
    """The name of a result among ``entries``, the other results of the model.

    It is the name of the entry with the same task and settings. A new one has the task's name, the split unless it is
    the task's own, and its unusual settings. If another result has that name, the settings in which the two
    differ follow.
    """
    settings = _as_json(settings)
    for name, entry in entries.items():
        if entry["task"] == task and entry["settings"] == settings:
            return name
    details = list_details(task, settings)
    while (name := f"{task} ({', '.join(details)})" if details else task) in entries:
        other = entries[name]["settings"]
        details += [
            f"{key} {settings.get(key)}" for key in {**settings, **other} if settings.get(key) != other.get(key)
        ]
    return name


def _read_for_saving(folder: str, model: dict[str, Any]) -> tuple[dict[str, Any], pa.Table | None]:
    """The entries and samples that stay: none of another model's. Damaged files are moved aside."""
    try:
        content = _read_content(folder)
        if content is None:
            return {}, None
        if content["model"].get("fingerprint") == model["fingerprint"]:
            rows = _read_rows(folder)
            for entry in content["results"].values():
                _choose_rows(folder, entry, rows)
            return content["results"], rows
        other = content["model"].get("name")
        logger.warning(f"{folder!r} has results of another model, {other!r}, or of older weights: they are replaced")
    except DamagedFile as error:
        logger.warning(f"{error}; the results start anew, and the previous files end in '.damaged' now")
        for name in (RESULTS, SAMPLES):
            with contextlib.suppress(FileNotFoundError):
                os.replace(os.path.join(folder, name), os.path.join(folder, name + ".damaged"))
    return {}, None


def _read_content(folder: str) -> dict[str, Any] | None:
    path = os.path.join(folder, RESULTS)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path!r} is damaged: it is not JSON ({error})") from error
    entry_keys = {"task", "main", "scores", "settings", "seconds", "items", "saved"}
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("model"), dict)
        or not isinstance(content.get("results"), dict)
        or not all(isinstance(entry, dict) and entry_keys <= set(entry) for entry in content["results"].values())
        or not all(
            isinstance(entry[key], dict) for entry in content["results"].values() for key in ("scores", "settings")
        )
        or not all(
            isinstance(score, dict) for entry in content["results"].values() for score in entry["scores"].values()
        )
    ):
        raise DamagedFile(f"{path!r} is damaged, or something else wrote it: it has no model and results")
    return content


def _read_rows(folder: str, saved: str | None = None) -> pa.Table:
    path = os.path.join(folder, SAMPLES)
    try:
        filters = None if saved is None else [("saved", "=", saved)]
        table = pq.read_table(path, filters=filters, page_checksum_verification=True)
    except FileNotFoundError as error:
        raise DamagedFile(f"{path!r} is missing") from error
    except (pa.ArrowException, OSError) as error:
        raise DamagedFile(f"{path!r} is damaged: {error}") from error
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise DamagedFile(f"{path!r} is damaged, or something else wrote it: it has no column {missing[0]!r}")
    metrics = [pa.field(name, pa.float64()) for name in table.column_names if name.startswith(METRIC)]
    schema = pa.schema([*SCHEMA, *metrics])
    try:
        return table.select(schema.names).cast(schema)
    except pa.ArrowException as error:
        raise DamagedFile(f"{path!r} is damaged, or something else wrote it: {error}") from error


def _write_rows(folder: str, rows: pa.Table) -> None:
    path = os.path.join(folder, SAMPLES)
    pq.write_table(rows, path + ".tmp", compression="zstd", write_page_checksum=True)
    sync(path + ".tmp")
    os.replace(path + ".tmp", path)
    sync(folder)


def _keep(rows: pa.Table | None, saved: Iterable[str]) -> pa.Table | None:
    if rows is None:
        return None
    return rows.filter(pc.is_in(rows["saved"], pa.array(list(saved), pa.string())))


def _as_table(name: str, saved: str, items: list[Item]) -> pa.Table:
    columns: dict[str, Any] = {
        field.name: pa.array([getattr(item, field.name) for item in items], field.type)
        for field in SCHEMA
        if field.name not in ("task", "saved")
    }
    columns["task"] = pa.array([name] * len(items), pa.string())
    columns["saved"] = pa.array([saved] * len(items), pa.string())
    metrics = dict.fromkeys(metric for item in items for metric in item.metrics)
    values = {METRIC + m: pa.array([item.metrics.get(m) for item in items], pa.float64()) for m in metrics}
    return pa.table({**{key: columns[key] for key in SCHEMA.names}, **values})


def _choose_rows(folder: str, entry: dict[str, Any], rows: pa.Table) -> pa.Table:
    """The rows of a result; DamagedFile if some are missing."""
    chosen = rows.filter(pc.equal(rows["saved"], entry["saved"]))
    if len(chosen) != entry["items"]:
        path, task = os.path.join(folder, SAMPLES), entry["task"]
        raise DamagedFile(f"{path!r} is damaged: it has {len(chosen)} of the {entry['items']} items of {task}")
    return chosen


def _as_result(folder: str, entry: dict[str, Any], rows: pa.Table) -> TaskResult:
    rows, items = _choose_rows(folder, entry, rows), []
    calibrations = _read_calibrations(rows["calibration"].combine_chunks())
    rows = rows.drop_columns(["calibration"])
    metric_names = [name for name in rows.column_names if name.startswith(METRIC)]
    for row, calibration in zip(rows.to_pylist(), calibrations, strict=True):
        items.append(
            Item(
                index=row["index"],
                prompt=row["prompt"],
                answer=row["answer"],
                outputs=tuple(row["outputs"]),
                correct=row["correct"],
                loglikelihoods=tuple(row["loglikelihoods"]),
                metrics={name[len(METRIC) :]: row[name] for name in metric_names if row[name] is not None},
                weight=row["weight"],
                calibration=calibration,
                skipped=row["skipped"],
            )
        )
    scores = {
        name: Score(**{**score, "value": math.nan if score["value"] is None else score["value"]})
        for name, score in entry["scores"].items()
    }
    return TaskResult(entry["task"], entry["main"], scores, items, entry["settings"], entry["seconds"])


def _read_calibrations(column: pa.ListArray) -> list[tuple[tuple[float, float, float], ...] | None]:
    """``Item.calibration`` of each row; ``to_pylist`` takes seconds for the items of HellaSwag."""
    tables = iter(column.flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, BINS, 3).tolist())
    return [tuple((n, c, h) for n, c, h in next(tables)) if valid else None for valid in column.is_valid().to_pylist()]


def _as_json(content: dict[str, Any]) -> dict[str, Any]:
    """As the content is after it was written and read: with lists for tuples, for example."""
    read: dict[str, Any] = json.loads(json.dumps(content))
    return read


def _without_nan(score: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in score.items()
    }
