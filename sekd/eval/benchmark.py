"""Models on tasks: everything is checked first, what is done is skipped, and each result is saved at once."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm
from transformers.utils import logging

from sekd.eval.backends import (
    BACKENDS,
    FIELD,
    BackendOptions,
    EvaluationRefused,
    choose_backend,
    choose_model_dtype,
    close_lm,
    is_out_of_memory,
    limit_context,
    load_lm,
    load_model_tokenizer,
    measure_context,
    shrink_batches,
)
from sekd.eval.distillation import measure_distillation
from sekd.eval.distillation_data import Distillation, DistillationOptions, prepare_distillation
from sekd.eval.harness import PreparedTask, TaskOptions, prepare_task, run_prepared
from sekd.eval.kept_answers import AnswerFile, KeepingLM
from sekd.eval.records import TaskResult
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
        teacher, distillation: the distance to this teacher is measured too; None for no such measure.
    """

    task: TaskOptions = field(default_factory=TaskOptions)
    output: str = "evaluations"
    backend: str | None = None
    dtype: str | None = None
    batch_size: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    force: bool = False
    teacher: str | None = None
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


def evaluate_models(
    models: Sequence[str], tasks: Sequence[tuple[str, str | None]], options: EvaluationOptions
) -> dict[str, dict[str, TaskResult]]:
    """Evaluate models on tasks, and return the results of each model by task.

    All names, data, tokenizers and folders are checked before the first model is loaded. A result with the same
    settings that the model's folder has is not computed again; a model with nothing to do is not loaded. Ctrl-C keeps
    the answers so far: the next call goes on from there.

    Args:
        models: folders or hub ids, of whole models or adapters.
        tasks: names and splits, as ``sekd.eval.tasks.resolve`` gives them.
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
        for model in models:
            check_model_name(FIELD, model)
        prepared = _prepare_tasks(tasks, options)
        checked = [_check_model(model, prepared, options) for model in dict.fromkeys(models)]
    return {model.name: _evaluate(model, prepared, options) for model in checked}


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn what checks raise into EvaluationRefused. The evaluation itself runs outside: its errors keep their kind."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise EvaluationRefused(str(error)) from error


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
        ValueError: it has no tokenizer, no chat template that is asked for, or a context that is too short; or its
            folder of results cannot be written.
    """
    tokenizer = load_model_tokenizer(name)
    if options.task.chat_template and not tokenizer.chat_template:
        raise ValueError(f"{FIELD} {name!r}: its tokenizer has no chat template; leave --chat-template out")
    context = limit_context(name, tokenizer)
    longest = {}
    for task, made in tasks.items():
        if made.max_new_tokens >= context:
            raise ValueError(
                f"{FIELD} {name!r} reads {context} tokens, and {task} generates up to {made.max_new_tokens}: "
                "set --max-new-tokens to less"
            )
        longest[task] = measure_context(made.texts, made.max_new_tokens, tokenizer)
        if options.task.chat_template:
            turn = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True)
            longest[task] += (made.settings["shots"] + 1) * len(turn["input_ids"])
        if longest[task] > context:
            logger.warning(
                f"{FIELD} {name!r} reads {context} tokens, and the longest prompt of {task} has {longest[task]} with "
                "its output: such prompts lose their beginning"
            )
    folder = name_folder(options.output, name)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise ValueError(f"output {options.output!r}: the folder {folder!r} cannot be made ({reason})") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"output {options.output!r}: the folder {folder!r} cannot be written")
    distillation = None
    if options.teacher is not None and options.distillation is not None:
        distillation = prepare_distillation(name, options.teacher, options.distillation)
    return _Model(name, folder, fingerprint_model(name), context, longest, distillation)


def _evaluate(model: _Model, tasks: dict[str, PreparedTask], options: EvaluationOptions) -> dict[str, TaskResult]:
    """The results of one model, in the order of the tasks; then its distance from the teacher."""
    results = dict[str, TaskResult]()
    with ExitStack() as stack:
        with _refusing():
            stack.enter_context(own_folder(model.folder))
        stack.enter_context(_stopping(model, results))
        if not options.force:
            settings = {name: (task.name, task.settings) for name, task in tasks.items()}
            settings |= {task: (task, own) for task, own in _list_distances(model).items()}
            for name, (known, own) in settings.items():
                done = find_done(model.folder, model.fingerprint, known, own)
                if done is not None:
                    results[name] = done
        if results:
            print(f"{model.name}: {', '.join(results)} done before")
        if missing := {name: task for name, task in tasks.items() if name not in results}:
            with _loaded(model, missing, options) as lm:
                for name, task in missing.items():
                    results[name] = _run(lm, model, name, task, options)
        distances = [task for task in _list_distances(model) if task not in results]
        if model.distillation is not None and distances:
            with _refusing():
                for result in measure_distillation(model.distillation, distances):
                    _save(model, result)
                    results[result.task] = result
    return {name: results[name] for name in (*tasks, *_list_distances(model))}


def _list_distances(model: _Model) -> dict[str, dict[str, Any]]:
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
def _stopping(model: _Model, results: dict[str, TaskResult]) -> Iterator[None]:
    """Let Ctrl-C say what is kept."""
    try:
        yield
    except KeyboardInterrupt as error:
        done = f"{', '.join(results)} done, and all other answers so far are" if results else "all answers so far are"
        raise KeyboardInterrupt(
            f"stopped while evaluating {model.name}: {done} kept in {model.folder}; the same command goes on"
        ) from error


def _run(lm: Any, model: _Model, name: str, task: PreparedTask, options: EvaluationOptions) -> TaskResult:
    """Let a model answer a task, and save the result."""
    assert options.backend is not None
    code = hashlib.sha256(json.dumps(task.settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
    header = {"model": model.fingerprint, "task": task.name, "settings": task.settings}
    header["versions"] = installed_versions()
    path = os.path.join(model.folder, f"answers-{task.name}-{code}.jsonl")
    if options.force and os.path.isfile(path):
        os.remove(path)
    file = AnswerFile(path, header)

    def shrink(lm: Any, error: Exception) -> None:
        shrink_batches(lm, str(options.backend), model.name, options.batch_size is not None, error)

    bar = tqdm(total=task.requests, desc=name, unit=" requests", dynamic_ncols=True, mininterval=0.5, smoothing=0.1)

    def count(answers: int) -> None:
        bar.update(answers)

    try:
        keeping = KeepingLM(lm, file, count, shrink, is_out_of_memory)
        result = run_prepared(keeping, task)
    finally:
        bar.close()
        file.close()
    _save(model, result)
    file.remove()
    return result


def _save(model: _Model, result: TaskResult) -> None:
    save_result(model.folder, {"name": model.name, "fingerprint": model.fingerprint}, result)
