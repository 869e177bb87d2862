"""How far is a student from its teacher, on texts and on its own completions? Both are models given by name.

Two tasks: ``text`` measures both models on the tokens of a file. ``rollouts`` measures them on what the student
generates for the prompts of a file, and whether its answers are right.
"""

import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from rollouts import ENGINES, Rollout, get_trait
from sekd.eval.backends import (
    LOADING_ERRORS,
    choose_device,
    free_memory,
    is_out_of_memory,
    load_weights,
    shorten_error,
    without_bars,
)
from sekd.eval.distillation_data import STUDENT, TEACHER, Distillation, DistillationOptions, configure
from sekd.eval.divergence import ROLLOUTS, TEXT, make_result, measure_completions, measure_texts
from sekd.eval.held_out import Pair
from sekd.eval.progress import show_bar
from sekd.eval.records import TaskResult
from sekd.models import check_head, count_classes, freeze, quantize
from sekd.on_policy.engines import make_engine, send_weights
from sekd.on_policy.weight_check import WeightCheck
from sekd.pretrained import load_config
from sekd.teachers import LiveTeacher

BARS = {TEXT: "text", ROLLOUTS: "divergence of the completions"}
"""What the progress bar of a task says."""
ROUND = 256
"""Prompts that the engine gets at once. Between two rounds the progress bar moves."""


def measure_distillation(prepared: Distillation, tasks: Collection[str] | None = None) -> Iterator[TaskResult]:
    """The results of the prepared tasks, or those among ``tasks``, each as soon as it is there.

    First the student generates. The engine has ended before the models are loaded onto its device. The seconds of a
    result are without loading; the seconds of ``rollouts`` include generation.

    Raises:
        ValueError: a model cannot be loaded, or vLLM cannot start or computes something else than the student.
    """
    chosen = [task for task in prepared.settings if tasks is None or task in tasks]
    if not chosen:
        return
    try:
        yield from _measure(prepared, chosen)
    finally:
        free_memory()


def _measure(prepared: Distillation, chosen: list[str]) -> Iterator[TaskResult]:
    """The results of the chosen tasks. The models are gone when this ends."""
    options, device = prepared.options, torch.device(choose_device())
    student = _load(prepared.student, STUDENT, options)
    vocab = min(count_classes(student), load_config(TEACHER, options.teacher, None).get_text_config().vocab_size)
    started = time.monotonic()
    rollouts = _generate(prepared, student, vocab, device) if ROLLOUTS in chosen else []
    generating = time.monotonic() - started
    bits = options.teacher_bits
    quantization = None if bits is None else quantize(bits == 4, options.chosen_dtype, device)
    teacher = _load(options.teacher, TEACHER, options, quantization)
    with _explaining_memory(options):
        for model in (student, teacher):
            check_head(model.to(device), packed=False)
    pair = Pair(student, LiveTeacher(teacher, vocab), vocab, device, batch_size=options.batch_size)
    for task in chosen:
        started, number = time.monotonic(), len(rollouts) if task == ROLLOUTS else len(prepared.texts)
        with _explaining_memory(options), show_bar(BARS[task], number) as advance:
            if task == ROLLOUTS:
                drawn = rollouts, prepared.tokenizer, prepared.answers, options.samples_as_is
                items = measure_completions(pair, prepared.prompts, *drawn, advance)
            else:
                items = measure_texts(pair, prepared.texts, prepared.tokenizer, advance)
        seconds = time.monotonic() - started + (generating if task == ROLLOUTS else 0)
        yield make_result(task, items, prepared.settings[task], seconds)


def _load(name: str, field: str, options: DistillationOptions, arguments: dict[str, Any] | None = None) -> Any:
    """A whole model, or an adapter with its base, to be read only."""
    try:
        with without_bars():
            return freeze(load_weights(name, options.chosen_dtype, arguments))
    except LOADING_ERRORS as error:
        problem = "does not fit into memory" if is_out_of_memory(error) else "cannot be loaded"
        raise ValueError(f"{field} {name!r} {problem}: {shorten_error(error)}") from error


@contextmanager
def _explaining_memory(options: DistillationOptions) -> Iterator[None]:
    """Turn an error for lack of memory into a ValueError that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"the student and its teacher do not fit into memory with batch_size {options.batch_size}: lower it, or "
            f"max_length ({shorten_error(error)})"
        ) from error


def _generate(prepared: Distillation, student: nn.Module, vocab: int, device: torch.device) -> list[Rollout]:
    """``repeats`` completions of each prompt, one after another. vLLM gets a copy of the weights, and ends before this
    returns, while the student waits in the CPU's memory."""
    options, rollouts = prepared.options, list[Rollout]()
    prompts = [s.input_ids[: s.prompt_length] for s in prepared.prompts for _ in range(options.repeats)]
    longest = max(map(len, prompts))
    if ENGINES[options.chosen_engine].shares_model:
        student.to(device)
    with tempfile.TemporaryDirectory(prefix="sekd-evaluate-") as folder:
        args = configure(options, lmbda=1.0, max_prompt_length=longest, output_dir=folder)
        with closing(make_engine(student, prepared.tokenizer, args, vocab)) as engine:
            send_weights(engine, student, 0, get_trait(engine, "lora_rank"))
            check = WeightCheck(longest + options.max_new_tokens - 1, nullcontext, _raise_error)
            check.check_sync(engine, student, prompts)
            with show_bar("completions", len(prompts)) as advance:
                for start in range(0, len(prompts), ROUND):
                    part = engine.generate(prompts[start : start + ROUND])
                    rollouts += part
                    advance(len(part))
    free_memory()
    return rollouts


def _raise_error(value: Any) -> Any:
    if isinstance(value, BaseException):
        raise value
    return value
