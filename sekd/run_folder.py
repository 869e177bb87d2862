"""The folder of a run: it has one owner at a time, and holds the results of one run.

A run gets a random name, which stands in ``run.json`` and in each of its checkpoints. A new run does not begin in a
folder with results, unless it may delete them. A run resumes only from a checkpoint whose recipe is its own. Fields in
:data:`MAY_CHANGE` may change, a change of a field in :data:`MAY_CHANGE_WITH_WARNING` is logged, and any other change is
refused.
"""

import glob
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import fields
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers.utils import logging

from sekd.checkpoints import (
    RunRefused,
    check_checkpoint,
    find_checkpoint,
    list_checkpoints,
    read_facts,
    remove_folder,
    remove_unfinished,
)
from sekd.files import lock_folder, read_checked, write_checked
from sekd.fingerprints import hash_data
from sekd.schedules import make_schedule

logger = logging.get_logger(__name__)

RUN_FILE = "run.json"
MODEL_FILES = (
    *(
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-*.safetensors",
        "model.safetensors.index.json",
    ),
    *("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.*"),
)
"""What a model or an adapter may have left in a folder, as patterns."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.*", "added_tokens.json"),
    *("special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt"),
)

LEFTOVERS = ("selection/*.safetensors", "metrics.jsonl", "recipe.yaml", "versions.json", RUN_FILE)
"""What belongs to a run, but is no result of value without a checkpoint or a model. They are deleted in this order: if
the process dies meanwhile, the folder is still known as a run's."""

MAY_CHANGE = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_on_signal", "merge_adapter"),
    *("samples_file", "head_chunk_rows", "import_modules", "rollouts", "rollout_server_urls"),
    *("rollout_timeout", "rollout_transfer", "per_device_eval_batch_size", "max_eval_samples"),
    *("project", "run_name", "report_to", "profile", "record_selection", "use_cpu", "disable_tqdm", "local_rank"),
    *("debug", "skip_memory_metrics", "torch_empty_cache_steps", "push_to_hub", "do_train", "do_eval"),
    *("do_predict", "metric_for_best_model", "greater_is_better", "load_best_model_at_end", "teacher_cache"),
    *("model_name_or_path", "model_revision", "teacher_model_name_or_path", "teacher_model_revision"),
    *("teacher_device", "teacher_fsdp", "activation_offloading"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
    *("include_num_input_tokens_seen", "gradient_checkpointing_kwargs"),
}
BEGINNINGS_THAT_MAY_CHANGE = ("log", "eval_", "save_", "hub_", "trackio_", "vllm_", "ddp_", "dataset_")
"""Fields, and beginnings of fields, that change nothing that a run learns. Data and models have fingerprints."""

MAY_CHANGE_WITH_WARNING = {
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16"),
    *("fp16", "tf32", "dtype", "teacher_dtype", "attn_implementation", "gradient_checkpointing"),
    *("rollout_engine", "fsdp", "fsdp_config", "deepspeed", "accelerator_config", "full_determinism"),
    *("early_stopping_patience", "early_stopping_threshold", "max_tokens"),
}
"""Fields that a resumed run may change. The change is named in a warning. All other fields must stay."""


HASHES = "the student's architecture or adapter", "the teacher", "the data"
"""What :func:`describe_run` knows by a hash. It means nothing to a reader."""


def lock_run(folder: str) -> AbstractContextManager[None]:
    """Let one run alone write into a folder; RunRefused if another run does."""
    message = f"another run is writing into output_dir {folder!r}; wait for it, or name another folder"
    return lock_folder(folder, RunRefused(message))


def check_free(folder: str, resume: str | bool | None, overwrite: bool, inputs: Sequence[str | None] = ()) -> None:
    """Check quickly, before models load, that a run can begin in a folder, or resume. It changes nothing.

    ``inputs`` are the models that the run reads.

    Raises:
        RunRefused: another run writes into the folder, it has the results of an earlier run, or ``overwrite`` would
            delete a model that the run reads.
        RunRefused: there is no checkpoint to resume from.
    """
    if os.path.isdir(folder):
        with lock_run(folder):
            pass
    if isinstance(resume, str):
        read_facts(resume)
    elif resume:
        if not list_checkpoints(folder):
            raise RunRefused(f"resume_from_checkpoint: there is no checkpoint in output_dir {folder!r}")
    else:
        check_results(folder, overwrite, inputs)


def check_results(folder: str, overwrite: bool, inputs: Sequence[str | None] = ()) -> None:
    """Check that a new run may begin in a folder: it has no results, or they are a run's and may be deleted.

    Raises:
        RunRefused: there are results, or files that no run wrote, or ``overwrite`` would delete a model of ``inputs``.
    """
    results = _list_results(folder)
    if os.path.isfile(os.path.join(folder, RUN_FILE)):
        if not overwrite and results:
            raise RunRefused(
                f"output_dir {folder!r} has the results of an earlier run ({_shorten_list(results)}): resume it with "
                "resume_from_checkpoint: true, delete them with overwrite_output_dir: true, or name another output_dir"
            )
        if read := [path for path in _add_bases(inputs) if _would_be_deleted(path, folder)]:
            raise RunRefused(
                f"overwrite_output_dir would delete {read[0]!r}, which this run reads; name another output_dir than "
                f"{folder!r}"
            )
    elif results := [*results, *(name for name in LEFTOVERS if os.path.exists(os.path.join(folder, name)))]:
        raise RunRefused(
            f"output_dir {folder!r} has files that no run of this version of sekd wrote ({_shorten_list(results)}); "
            "name another output_dir, or move them away"
        )


def begin_run(folder: str) -> str:
    """Begin a new run in a locked folder, and return the run's name. The results of an earlier run are deleted."""
    for checkpoint in (*list_checkpoints(folder).values(), *glob.glob(_inside(folder, "checkpoint-*.old"))):
        remove_folder(checkpoint)
    for pattern in (*MODEL_FILES, *TOKENIZER_FILES, *LEFTOVERS):
        for path in glob.glob(_inside(folder, pattern)):
            os.remove(path)
    remove_unfinished(folder)
    return _name_run(folder, uuid.uuid4().hex)


def resume_run(
    folder: str, resume: str | bool, facts: Mapping[str, Any], overwrite: bool, inputs: Sequence[str | None] = ()
) -> tuple[str, str]:
    """The checkpoint to resume from, and the run's name.

    ``resume`` is a checkpoint's path, or True for the newest whole checkpoint of the folder. A checkpoint of another
    folder begins a new run here.

    Raises:
        RunRefused: there is no whole checkpoint; the recipe is not the checkpoint's (the message says where); or the
            checkpoint is from another folder, and this one has results.
    """
    remove_unfinished(folder)
    checkpoint = resume if isinstance(resume, str) else find_checkpoint(folder)
    known = check_checkpoint(checkpoint)
    if known["save_only_model"]:
        raise RunRefused(f"{checkpoint!r} has no optimizer state (save_only_model), so no run can resume from it")
    compare_facts(checkpoint, known["run_facts"], facts)
    own = list_checkpoints(folder)
    if not any(os.path.samefile(path, checkpoint) for path in own.values()):
        check_results(folder, overwrite, [checkpoint, *inputs])
        return checkpoint, begin_run(folder)
    name = _read_name(folder)
    if name not in (None, known["run"]):
        raise RunRefused(f"{checkpoint!r} belongs to another run than output_dir {folder!r}; start again")
    return checkpoint, _name_run(folder, known["run"])


def list_keys(records: Sequence[Any]) -> dict[str, Any]:
    """All fields of a recipe's records, by key and as plain values. Tokens of accounts are left out."""
    keys: dict[str, Any] = {}
    for record in records:
        values = record.to_dict() if hasattr(record, "to_dict") else vars(record)
        names = [f.name for f in fields(record) if f.init and not f.name.endswith("_token")]
        keys |= {name: values[name] for name in names if name in values}
    return keys


def describe_run(
    keys: Mapping[str, Any], processes: int, student: nn.Module, teacher: Any, data: Dataset | IterableDataset
) -> dict[str, Any]:
    """What a resumed run must have in common with the run, as JSON: its keys, models and data.

    ``teacher`` is what tells the teacher from another one (:meth:`sekd.teachers.TeacherSource.describe`). Only names
    and shapes of the student count, since the weights are those of the checkpoint.
    """
    shapes = [f"{name} {tuple(parameter.shape)}" for name, parameter in student.named_parameters()]
    if make_schedule("lmbda", keys.get("lmbda", 0)).highest > 0:
        keys = {**keys, "number of processes": processes}  # each keeps the rollouts of its own prompts
    if isinstance(data, IterableDataset) and data.num_shards > 1:  # its files are dealt out to processes and workers
        workers = max(1, keys["dataloader_num_workers"])
        keys = {**keys, "number of processes": processes, "number of loader workers": workers}
    step = keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"] * processes
    hashes = [_hash(shapes), _hash([json.dumps(teacher)]), hash_data(data)]
    facts = {"sequences a step": step, **dict(zip(HASHES, hashes, strict=True))}
    return json.loads(json.dumps({**keys, **facts}, default=str))


def _hash(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def compare_facts(checkpoint: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what a checkpoint was trained with, and what the run would go on with.

    Raises:
        RunRefused: they differ in a field that decides what the run learns.
    """
    # A key that one of them lacks is of another version, or of a recipe that the other run did not need.
    names = [name for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
    differing = [name for name in names if name not in MAY_CHANGE and not name.startswith(BEGINNINGS_THAT_MAY_CHANGE)]
    lines = [_contrast(name, before[name], now[name]) for name in differing]
    if refused := [line for name, line in zip(differing, lines, strict=True) if name not in MAY_CHANGE_WITH_WARNING]:
        raise RunRefused(
            f"this run cannot resume from {checkpoint!r}, which differs in {', '.join(refused)}; take its values, or "
            "begin a new run from its weights (model_name_or_path) in another output_dir"
        )
    if differing:
        logger.warning(f"resuming from {checkpoint!r}, which differs in {', '.join(lines)}")


def _list_results(folder: str) -> list[str]:
    """The names of checkpoints and model files in a folder."""
    results = [*map(os.path.basename, list_checkpoints(folder).values())]
    return results + [os.path.basename(path) for pattern in MODEL_FILES for path in glob.glob(_inside(folder, pattern))]


def _shorten_list(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + " and more" * (len(names) > 2)


def _add_bases(models: Sequence[str | None]) -> list[str]:
    """The folders among some models, and the bases of those that are adapters."""
    folders = [path for path in models if path and os.path.isdir(path)]
    for path in [*folders]:
        with suppress(OSError, ValueError, KeyError), open(os.path.join(path, "adapter_config.json")) as file:
            folders.append(str(json.load(file)["base_model_name_or_path"]))
    return folders


def _would_be_deleted(path: str, folder: str) -> bool:
    """Whether a model is the folder's own, or lies in one of its checkpoints."""
    for resolve in (os.path.abspath, os.path.realpath):  # a checkpoint may be a link
        place = os.path.relpath(resolve(path), resolve(folder)).split(os.sep)
        if place[0] == "." or place[0].startswith("checkpoint-"):
            return True
    return False


def _inside(folder: str, pattern: str) -> str:
    return os.path.join(glob.escape(folder), pattern)


def _name_run(folder: str, name: str) -> str:
    write_checked(os.path.join(folder, RUN_FILE), {"run": name})
    return name


def _read_name(folder: str) -> str | None:
    path = os.path.join(folder, RUN_FILE)
    try:
        return read_checked(path)["run"] if os.path.isfile(path) else None
    except ValueError:
        return None


def _contrast(name: str, before: Any, now: Any) -> str:
    if name in HASHES:
        return name
    return f"{name} {_shorten(now)} (it has {_shorten(before)})"


def _shorten(value: Any) -> str:
    text = repr(_restore_numbers(value))
    return text if len(text) <= 40 else text[:37] + "..."


def _restore_numbers(value: Any) -> Any:
    """The steps of a schedule as numbers again. JSON has only texts for keys."""
    if not isinstance(value, dict):
        return value
    return {int(key) if key.isdecimal() else key: _restore_numbers(number) for key, number in value.items()}
