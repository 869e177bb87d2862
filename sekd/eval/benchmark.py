"""Models on tasks: everything is checked first, what is done is skipped, and each result is saved at once."""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from transformers.utils import logging

from sekd.eval.backends import (
    BACKENDS,
    FIELD,
    BackendOptions,
    check_arguments,
    choose_backend,
    choose_model_dtype,
    close_lm,
    count_longest,
    is_out_of_memory,
    load_lm,
    load_model_tokenizer,
    read_context_length,
    shorten_error,
    shrink_batches,
)
from sekd.eval.distillation import measure_distillation
from sekd.eval.distillation_data import TEACHER, Distillation, DistillationOptions, prepare_distillation
from sekd.eval.harness import run_prepared
from sekd.eval.kept_answers import AnswerFile, KeepingLM, is_begun
from sekd.eval.prepared import PreparedTask, TaskOptions, prepare_task
from sekd.eval.progress import show_bar
from sekd.eval.records import EvaluationRefused, TaskResult
from sekd.eval.result_files import find_done, fingerprint_model, name_folder, own_folder, save_result
from sekd.pretrained import check_model_name
from sekd.versions import installed_versions

logger = logging.get_logger(__name__)
CONTEXT_STEP = 64
"""The context that vLLM reserves is a multiple of it."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How models are evaluated.

    Attributes:
        task: how each task is evaluated.
        output: the folder that gets one folder a model.
        backend: a name in ``BACKENDS``; None for vLLM where it is installed, else transformers.
        dtype: of the weights; None for the faster of bfloat16 and float32.
        batch_size: None for a size that fits.
        arguments: more arguments of the backend.
        force: evaluate again what is done.
        distillation: the distance from a teacher is measured too; None for no such measure.
    """

    task: TaskOptions = field(default_factory=TaskOptions)
    output: str = "evaluations"
    backend: str | None = None
    dtype: str | None = None
    batch_size: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    force: bool = False
    distillation: DistillationOptions | None = None


@dataclass(frozen=True)
class _Model:
    """A model that was checked: its folder of results, and the tokens that it reads at most."""

    name: str
    folder: str
    fingerprint: str
    context: int
    longest: dict[str, int]
    distillation: Distillation | None


@dataclass(frozen=True)
class _Work:
    """A task for a model: its name, its settings, and the file of its answers while it is not done."""

    task: str
    settings: dict[str, Any]
    path: str
    header: dict[str, Any]


def evaluate_models(
    models: Sequence[str], tasks: Sequence[tuple[str, str | None]], options: EvaluationOptions
) -> dict[str, dict[str, TaskResult]]:
    """Evaluate models on tasks, and return the results of each model by task.

    All names, data, tokenizers and folders are checked before the first model is loaded. A result with the same
    settings that the model's folder has is not computed again; a model with nothing to do is not loaded. Ctrl-C keeps
    the answers so far: the next call resumes from there.

    Args:
        models: folders or hub ids, of whole models or adapters.
        tasks: names and splits, as ``sekd.eval.tasks.resolve_tasks`` gives them.
        options: see ``EvaluationOptions``.

    Raises:
        EvaluationRefused: a model, task, data file or option is invalid, or a model does not fit into memory.
        KeyboardInterrupt: the user stopped it; the message says what is kept.
    """
    backend, dtype = options.backend or choose_backend(), choose_model_dtype(options.dtype)
    options = replace(options, backend=backend, dtype=dtype)
    with _refusing():
        if not find_spec(BACKENDS[backend].package):
            raise ValueError(
                f"backend {backend!r} needs the package {BACKENDS[backend].package}, which is not installed; use hf"
            )
        check_arguments(options.arguments)
        for model in models:
            check_model_name(FIELD, model)
        prepared = _prepare_tasks(tasks, options)
        checked = [
            _check_model(model, prepared, options)
            for model in dict.fromkeys(name.rstrip("/") if os.path.isdir(name) else name for name in models)
        ]
        for one in checked:
            _make_folder(one.folder, options.output)
        if options.force:
            for one in checked:
                _begin_anew(one, _list_work(one, prepared))
    return {model.name: _evaluate(model, prepared, options) for model in checked}


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn what checks raise into EvaluationRefused."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise EvaluationRefused(str(error)) from error


@contextmanager
def _naming(model: str) -> Iterator[None]:
    """Turn a ValueError of the evaluation itself into EvaluationRefused, which names the model."""
    try:
        yield
    except ValueError as error:
        told = shorten_error(error, 1000)
        told = told if told.startswith((FIELD, TEACHER)) else f"{FIELD} {model!r}: {told}"
        raise EvaluationRefused(told) from error


def _prepare_tasks(tasks: Sequence[tuple[str, str | None]], options: EvaluationOptions) -> dict[str, PreparedTask]:
    """The tasks by the names of their results: a second split of a task has it in its name."""
    prepared: dict[str, PreparedTask] = {}
    for task, split in tasks:
        made = prepare_task(task, split, options.task)
        own: dict[str, Any] = {"backend": options.backend, "dtype": options.dtype}
        own |= {"arguments": options.arguments} if options.arguments else {}
        name = task if task not in prepared else f"{task}@{made.settings['split']}"
        prepared[name] = replace(made, settings=made.settings | own)
    return prepared


def _check_model(name: str, tasks: dict[str, PreparedTask], options: EvaluationOptions) -> _Model:
    """Check a model by its files alone.

    Raises:
        ValueError: it has no tokenizer, no chat template that is asked for, or a context that is too short.
    """
    tokenizer = load_model_tokenizer(name)
    if options.task.chat_template and not tokenizer.chat_template:
        raise ValueError(f"{FIELD} {name!r}: its tokenizer has no chat template; leave --chat-template out")
    context = read_context_length(name, tokenizer)
    longest = {}
    for task, made in tasks.items():
        if made.max_new_tokens >= context:
            raise ValueError(
                f"{FIELD} {name!r} reads {context} tokens, and {task} generates up to {made.max_new_tokens}: "
                "set --max-new-tokens to less"
            )
        longest[task] = count_longest(made.texts, made.max_new_tokens, tokenizer)
        if options.task.chat_template:
            turn = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True)
            longest[task] += (made.settings["shots"] + 1) * len(turn["input_ids"])
        if longest[task] > context:
            logger.warning(
                f"{FIELD} {name!r} reads {context} tokens, and the longest prompt of {task} has {longest[task]} with "
                "its output: such prompts lose their beginning"
            )
    distillation = None if options.distillation is None else prepare_distillation(name, options.distillation)
    return _Model(name, name_folder(options.output, name), fingerprint_model(name), context, longest, distillation)


def _make_folder(folder: str, output: str) -> None:
    """Make the folder of a model's results; ValueError if it cannot be written."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output {output!r}: the folder {folder!r} cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"output {output!r}: the folder {folder!r} cannot be written")


def _evaluate(model: _Model, tasks: dict[str, PreparedTask], options: EvaluationOptions) -> dict[str, TaskResult]:
    """The results of one model, in the order of the tasks; then its distance from the teacher."""
    results, work = dict[str, TaskResult](), _list_work(model, tasks)
    with ExitStack() as stack:
        with _refusing():
            stack.enter_context(own_folder(model.folder))
        with _stopping(model, results, options.force, keeps_answers=True):
            _find_results(model, work, results)
            if missing := {name: task for name, task in tasks.items() if name not in results}:
                with _loaded(model, missing, options) as lm:
                    for name, task in missing.items():
                        with _naming(model.name):
                            result = _run(lm, model, name, task, work[name], options)
                        _save(model, result, work)
                        results[name] = result
        with _stopping(model, results, options.force, keeps_answers=False), _naming(model.name):
            distances = [task for task in get_distance_settings(model) if task not in results]
            if model.distillation is not None and distances:
                for result in measure_distillation(model.distillation, distances):
                    _save(model, result, work)
                    results[result.task] = result
    return {name: results[name] for name in work}


def _begin_anew(model: _Model, work: dict[str, _Work]) -> None:
    """Begin the file of answers of each task: a task with one is not done, whatever result there is.

    So if a forced evaluation is stopped, the next call does all that is left, without force.
    """
    with own_folder(model.folder):
        for one in work.values():
            with suppress(FileNotFoundError):
                os.remove(one.path)
            AnswerFile(one.path, one.header).close()


def _find_results(model: _Model, work: dict[str, _Work], results: dict[str, TaskResult]) -> None:
    """Put what is done into the results."""
    for name, one in work.items():
        if not is_begun(one.path, one.header):
            done = find_done(model.folder, model.fingerprint, one.task, one.settings)
            if done is not None:
                results[name] = done
    if results:
        print(f"{model.name}: {', '.join(results)} done before")


def _list_work(model: _Model, tasks: dict[str, PreparedTask]) -> dict[str, _Work]:
    """All that is asked for of a model, by the names of the results."""
    chosen = {name: (task.name, task.settings) for name, task in tasks.items()}
    chosen |= {task: (task, settings) for task, settings in get_distance_settings(model).items()}
    work = {}
    for name, (task, settings) in chosen.items():
        code = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
        header = {"model": model.fingerprint, "task": task, "settings": settings, "versions": installed_versions()}
        work[name] = _Work(task, settings, os.path.join(model.folder, f"answers-{task}-{code}.jsonl"), header)
    return work


def get_distance_settings(model: _Model) -> dict[str, dict[str, Any]]:
    """The tasks of the suite distillation that are asked for, with their settings."""
    return {} if model.distillation is None else model.distillation.settings


@contextmanager
def _loaded(model: _Model, tasks: dict[str, PreparedTask], options: EvaluationOptions) -> Iterator[Any]:
    assert options.backend is not None  # evaluate_models chose it
    need = max(model.longest[name] for name in tasks) + 8  # a prefix token, and tokens that fall apart at the end
    need = -(-need // CONTEXT_STEP) * CONTEXT_STEP
    samples = any(task.settings.get("temperature", 0.0) > 0 for task in tasks.values())
    how = BackendOptions(
        options.dtype, options.batch_size, min(need, model.context), samples, options.task.seed, options.arguments
    )
    print(f"{model.name}: loading with {options.backend} in {options.dtype}")
    lm = load_lm(model.name, options.backend, how)
    try:
        yield lm
    finally:
        close_lm(lm, options.backend)


@contextmanager
def _stopping(model: _Model, results: dict[str, TaskResult], force: bool, keeps_answers: bool) -> Iterator[None]:
    """Let Ctrl-C say what is kept: finished answers too (``keeps_answers``), or finished tasks alone."""
    try:
        yield
    except KeyboardInterrupt as error:
        done = ", ".join(results)
        if keeps_answers:
            told = f"{done} done, and all other finished answers are" if done else "all finished answers are"
            told += f" kept in {model.folder}"
        else:
            told = f"{done} done and kept in {model.folder}" if done else "no task is done"
            told += ", and the present task begins anew"
        again = "to resume, run it again without --force" if force else "the same command resumes"
        raise KeyboardInterrupt(f"stopped while evaluating {model.name}: {told}; {again}") from error


def _run(lm: Any, model: _Model, name: str, task: PreparedTask, work: _Work, options: EvaluationOptions) -> TaskResult:
    """Let a model answer a task. Its answers are in the file of ``work`` as they come."""

    def shrink(lm: Any, error: Exception) -> None:
        shrink_batches(lm, str(options.backend), model.name, options.batch_size is not None, error)

    file = AnswerFile(work.path, work.header)
    with closing(file), show_bar(name, task.requests, initial=len(file.answers)) as advance:
        return run_prepared(KeepingLM(lm, file, advance, shrink, is_out_of_memory), task)


def _save(model: _Model, result: TaskResult, work: dict[str, _Work]) -> None:
    """Save a result, and delete the answers to its task: its own, and old ones with other settings or versions."""
    save_result(model.folder, {"name": model.name, "fingerprint": model.fingerprint}, result)
    others = {one.path for one in work.values() if one.task == result.task and one.settings != result.settings}
    _delete_answers(model, result.task, keep=others)


def _delete_answers(model: _Model, task: str, keep: Collection[str] = ()) -> None:
    for file in os.listdir(model.folder):
        path = os.path.join(model.folder, file)
        if re.fullmatch(rf"answers-{re.escape(task)}-[0-9a-f]{{8}}\.jsonl", file) and path not in keep:
            os.remove(path)
