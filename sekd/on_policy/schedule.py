"""When rollouts are generated: which optimizer steps are on-policy, in which round, and with which weights."""

import json
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME

from rollouts import Rollout, RolloutConfigError, RolloutEngine, RolloutError, Sampling, get_trait
from sekd.checkpoints import RunRefused
from sekd.config import SEKDConfig
from sekd.data.batch import Sample, from_rollout
from sekd.distributions import entropy_from_top
from sekd.on_policy.engines import keep_generators, make_engine, samples_from, send_weights
from sekd.on_policy.record import (
    append_rollouts,
    load_rollouts,
    resume_file,
    save_rollouts,
    show_completions,
    start_file,
)
from sekd.on_policy.weight_check import WeightCheck
from sekd.timing import timed
from sekd.validation.rollouts import engine_trait

MicroBatches = list[list[Sample]]
"""The samples of an optimizer step."""

Timed = tuple[list[Rollout], float]
"""Rollouts, and the seconds that it took to generate them."""

EVALUATION = -1
"""The step of an evaluation's rollouts. Its seeds differ from those of training, and are the same each time."""

NOT_SENT = -2
"""The step of weights that were never sent."""


@dataclass
class Step:
    """An optimizer step. An on-policy step learns from ``rollouts``, one per sample, which arrive with its round."""

    number: int
    micro_batches: MicroBatches
    is_on_policy: bool
    rollouts: list[Rollout] = field(default_factory=list)

    @property
    def samples(self) -> list[Sample]:
        """The samples of all micro-batches."""
        return [sample for micro_batch in self.micro_batches for sample in micro_batch]

    @property
    def needs_rollouts(self) -> bool:
        """Whether it is on-policy, and neither a checkpoint nor the engine gave its rollouts yet."""
        return self.is_on_policy and not self.rollouts

    def answers_its_prompts(self, rollouts: Sequence[Rollout]) -> bool:
        """Whether these are rollouts of its prompts, in order."""
        return [rollout.prompt_ids for rollout in rollouts] == _get_prompts(self.samples)


@dataclass
class _Round:
    """Steps whose missing rollouts were requested; ``get_rollouts`` waits for them."""

    steps: list[Step]
    get_rollouts: Callable[[], Timed]


class RolloutSchedule:
    """The optimizer steps of a run; on-policy steps get completions by the student.

    A round is one call of the engine, for the on-policy steps among ``rollout_batches`` steps. With
    ``rollout_staleness`` 1, the next round is generated with the current weights while this round is trained on.
    Rollouts are then up to 2 ``rollout_batches`` - 1 steps old, else up to ``rollout_batches`` - 1. Rollouts that were
    generated and not trained on yet are part of a checkpoint, so that a resumed run learns from the same rollouts.

    Args:
        get_student: returns the student in its wrappers, which change when training begins.
        classes: the number of classes that student and teacher have in common.
        count: adds to the sums of the next log, by name: ``count(rollouts=4)``.
        engine: is used instead of ``args.rollout_engine``, which otherwise is started before the first round.
        evaluation_context: tokens of the longest prompt with its completion in :meth:`generate_with`; 0 without it.
    """

    def __init__(
        self,
        args: SEKDConfig,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        get_student: Callable[[], nn.Module],
        classes: int,
        count: Callable[..., None],
        engine: RolloutEngine | None = None,
        evaluation_context: int = 0,
    ) -> None:
        self.evaluation_context = evaluation_context
        self.args, self.accelerator, self.tokenizer = args, accelerator, tokenizer
        self.get_student, self.classes, self.count = get_student, classes, count
        self.engine, self.engine_was_given = engine, engine is not None
        self.shared_engine = args.world_size > 1 and not engine_trait(args, engine, "per_process")
        self.ready: deque[Step] = deque()
        self.pending: _Round | None = None
        self.restored: dict[int, list[Rollout]] = {}
        self.started, self.synced_step = False, NOT_SENT
        self.weight_check = self._make_weight_check()
        self.thread: ThreadPoolExecutor | None = None
        self.job: Future[Timed] | None = None

    def next_step(self, number: int, max_steps: int, pull: Callable[[], MicroBatches]) -> MicroBatches:
        """The samples of optimizer step ``number``, and of the current weights.

        Args:
            max_steps: the number of steps in the run; nothing is generated for later ones.
            pull: returns the data of the next step; nothing at the end of an epoch.

        Raises:
            RolloutError: the engine returned no completions.
        """
        if not self.ready:
            current = self.pending or self._start_round(range(number, max_steps), number, pull, background=False)
            self.pending = None
            self.ready = deque(self._finish(current))
            if self.args.rollout_staleness and self.ready:
                numbers = range(number + len(self.ready), max_steps)
                ahead = self._start_round(numbers, number, pull, background=True)
                self.pending = ahead if ahead.steps else None  # at the end of an epoch there is no next step
        if not self.ready:
            return []
        step = self.ready.popleft()
        if not step.is_on_policy:
            return step.micro_batches
        self._record(step)
        rollouts = iter(step.rollouts)
        return [[self._replace_completion(sample, next(rollouts)) for sample in part] for part in step.micro_batches]

    def _start_round(
        self, numbers: range, weights_step: int, pull: Callable[[], MicroBatches], background: bool
    ) -> _Round:
        """Pull the steps of the round that begins with the first number, and request their rollouts."""
        batches, steps = self.args.rollout_batches, list[Step]()
        for number in numbers[: batches - numbers.start % batches]:
            if not (micro_batches := pull()):
                break
            step = Step(number, micro_batches, is_on_policy(self.args, number))
            if step.is_on_policy:
                step.rollouts = self._take_restored(step)
            steps.append(step)
        samples = [sample for step in steps if step.needs_rollouts for sample in step.samples]
        # All processes agree here: they have the same number of steps, and restored rollouts of the same steps.
        if not samples:
            return _Round(steps, lambda: ([], 0.0))
        return _Round(steps, self._request(_get_prompts(samples), weights_step, background))

    def _take_restored(self, step: Step) -> list[Rollout]:
        """The rollouts that a checkpoint has for a step, or none."""
        rollouts = self.restored.pop(step.number, [])
        if rollouts and not step.answers_its_prompts(rollouts):
            raise RunRefused(
                f"the checkpoint's rollouts for step {step.number} are for other prompts; resume with the same data, "
                "seed and batch sizes"
            )
        return rollouts

    def _finish(self, current: _Round) -> list[Step]:
        """Wait for a round's rollouts, and give each step its own."""
        rollouts, seconds = current.get_rollouts()
        tokens = sum(len(r.completion_ids) for r in rollouts)
        self.count(rounds=bool(rollouts), rollouts=len(rollouts), rollout_tokens=tokens, rollout_seconds=seconds)
        self.count(rollout_prompt_tokens=sum(len(r.prompt_ids) for r in rollouts))
        remaining = iter(rollouts)
        for step in current.steps:
            if step.needs_rollouts:
                step.rollouts = [next(remaining) for _ in step.samples]
                self._check_rollouts(step.rollouts, _get_prompts(step.samples))
        return current.steps

    def _check_rollouts(self, rollouts: Sequence[Rollout], prompts: list[list[int]]) -> None:
        """An engine of one's own may mix up prompts, or may not forbid the classes that only the student has."""
        if [rollout.prompt_ids for rollout in rollouts] != prompts:
            raise RolloutConfigError("the rollout engine's answers are for other prompts, or in another order")
        largest = max((max(rollout.completion_ids, default=0) for rollout in rollouts), default=0)
        if largest >= self.classes:
            raise RolloutConfigError(
                f"the rollout engine generated token {largest}, and the teacher has {self.classes} classes: the engine "
                "must not draw token ids from Sampling.classes on"
            )

    def _record(self, step: Step) -> None:
        """Count, show and keep the rollouts of a step that is trained on now."""
        rollouts, every = step.rollouts, self.args.log_completions_steps
        self.count(
            trained_rollouts=len(rollouts),
            stale_steps=sum(step.number - rollout.weights_step for rollout in rollouts),
            cut_rollouts=sum(rollout.finish_reason == "length" for rollout in rollouts),
            empty_rollouts=sum(not rollout.completion_ids for rollout in rollouts),
        )
        if every and step.number % every == 0 and self.accelerator.is_main_process:
            show_completions(self.tokenizer, rollouts[:2], step.number)
        if self.args.save_rollouts:
            append_rollouts(self._get_file(), step.number, step.samples, rollouts, self.tokenizer)

    def _replace_completion(self, sample: Sample, rollout: Rollout) -> Sample:
        """The sample with the student's completion, and with entropies if the rollout has log-probabilities."""
        if rollout.top_logprobs is None:
            return from_rollout(sample, rollout)
        entropies = entropy_from_top(torch.from_numpy(rollout.top_logprobs), self.classes)
        return from_rollout(sample, rollout, entropies.tolist())

    # The engine

    def begin_evaluation(self) -> None:
        """Send the weights again before the next rollouts."""
        self.synced_step = NOT_SENT

    def generate(self, samples: Sequence[Sample]) -> list[Rollout]:
        """Completions of the samples' prompts, for an evaluation (:meth:`begin_evaluation`)."""
        return self._request(_get_prompts(samples), EVALUATION, background=False)()[0]

    def generate_with(self, prompts: list[list[int]], sampling: Sampling) -> list[Rollout]:
        """Completions of prompts that are sampled in another way than those of training, for an evaluation.

        The rollouts of training stay those that they would have been. Every process must call it.
        """
        rollouts = self._request(prompts, EVALUATION, background=False, sampling=sampling)()[0]
        self._check_rollouts(rollouts, prompts)
        return rollouts

    @property
    def takes_sampling(self) -> bool:
        """Whether the run has an engine with :meth:`generate_with`."""
        return self.args.any_on_policy and engine_trait(self.args, self.engine, "takes_sampling")

    @timed("generation")
    def _request(
        self, prompts: list[list[int]], step: int, background: bool, sampling: Sampling | None = None
    ) -> Callable[[], Timed]:
        """Send the weights of ``step``, and request completions. The returned function waits for them."""
        if self.job is not None:
            wait([self.job])  # an engine does one thing at a time
        rank = self.accelerator.process_index if self.shared_engine else 0
        by_rank = gather_object([prompts]) if self.shared_engine else [prompts]
        all_prompts = [prompt for of_rank in by_rank for prompt in of_rank]
        with keep_generators(f"{self.args.seed}/{step}/{self.accelerator.process_index}"):
            self._prepare_engine(step, all_prompts)
            if self.engine is not None and not background:
                with self._autocast():
                    self.job = _run_inline(_generate_timed, self.engine, all_prompts, sampling)
        if self.engine is not None and background:
            # Generators cannot be kept while the student trains: an engine that generates in background has its own.
            self.thread = self.thread or ThreadPoolExecutor(1)
            self.job = self.thread.submit(_generate_timed, self.engine, all_prompts)
        first = sum(map(len, by_rank[:rank]))
        return partial(self._get_rollouts, self.job, slice(first, first + len(prompts)))

    def _autocast(self) -> AbstractContextManager:
        """Only an engine that samples from the student itself computes as the trainer does."""
        shares = samples_from(self.engine, self.get_student())
        return self.accelerator.autocast() if shares else nullcontext()

    @timed("generation")
    def _get_rollouts(self, job: Future[Timed] | None, part: slice) -> Timed:
        """Wait for a job, and return this process's part of its rollouts, or raise its error."""
        if not self.shared_engine:
            assert job is not None
            return job.result()
        rollouts, seconds = self._broadcast_from_main(None if job is None else job.exception() or job.result())
        return rollouts[part], seconds / self.args.world_size  # the log adds up all processes

    def _broadcast_from_main(self, result: Any) -> Any:
        """The result of the main process. An error is raised in every process, so that none waits for the others."""
        if isinstance(result, BaseException):  # errors of other classes may not survive pickling
            result = (RolloutError if isinstance(result, RolloutError) else RolloutConfigError)(str(result))
        payload = [result]
        if self.shared_engine:
            broadcast_object_list(payload)
        if isinstance(payload[0], BaseException):
            raise payload[0]
        return payload[0]

    def _prepare_engine(self, step: int, prompts: list[list[int]]) -> None:
        """Start the engine if needed, and send it the weights of ``step`` if it has others.

        Every process must call this: all of them may be needed to gather the student's weights.
        """
        result: Any = 0
        if self.engine is None and (not self.shared_engine or self.accelerator.is_main_process):
            try:
                model, context = self.get_student(), self.evaluation_context
                self.engine = make_engine(model, self.tokenizer, self.args, self.classes, context)
            except (RolloutError, RolloutConfigError) as error:
                result = error
        if self.engine is not None:
            result = get_trait(self.engine, "lora_rank")
        max_lora_rank = self._broadcast_from_main(result)
        is_new, self.started = not self.started, True
        if is_new or step != self.synced_step:
            with timed("sync"):
                self._broadcast_from_main(self._send_weights(step, max_lora_rank))
                self.synced_step = step
                self.weight_check.check_sync(self.engine, self.get_student(), prompts)

    def _send_weights(self, step: int, max_lora_rank: int) -> Exception | None:
        try:
            send_weights(self.engine, self.get_student(), step, max_lora_rank)
        except (RolloutError, RolloutConfigError) as error:
            return error
        return None

    def _make_weight_check(self) -> WeightCheck:
        limit = self.args.max_prompt_length + self.args.max_completion_length - 1
        return WeightCheck(limit, self.accelerator.autocast, self._broadcast_from_main)

    # What outlives the process

    def begin(self, checkpoint: str | None) -> None:
        """Begin a run, or resume with the rollouts of a checkpoint that were not trained on yet."""
        self.ready.clear()
        self.pending, self.restored, self.synced_step, done = None, {}, NOT_SENT, 0
        if checkpoint:
            with open(os.path.join(checkpoint, TRAINER_STATE_NAME)) as file:
                done = json.load(file)["global_step"]
            self.restored = load_rollouts(os.path.join(checkpoint, self._get_state_name()))
        is_own = checkpoint is not None and os.path.samefile(os.path.dirname(checkpoint), str(self.args.output_dir))
        if self.args.save_rollouts and is_own:
            resume_file(self._get_file(), done)
        elif self.args.save_rollouts:
            start_file(self._get_file())

    def save(self, folder: str) -> None:
        """Write the rollouts that were generated and not trained on yet into a checkpoint folder."""
        steps = [*self.ready]
        if self.pending is not None:
            with suppress(RolloutError):  # raised again when the round is needed
                finished = self._finish(self.pending)
                self.pending = _Round(finished, lambda: ([], 0.0))
                steps += finished
        save_rollouts(
            os.path.join(folder, self._get_state_name()),
            {step.number: step.rollouts for step in steps if step.is_on_policy},
        )

    def _get_state_name(self) -> str:
        return f"rollouts_{self.args.process_index}.pt"

    def _get_file(self) -> str:
        rank = f"_{self.args.process_index}" if self.args.process_index else ""
        return os.path.join(str(self.args.output_dir), f"rollouts{rank}.jsonl")

    def close(self) -> None:
        """Close the engine, even in the middle of a round."""
        if self.engine is not None:
            with keep_generators("close"):
                self.engine.close()
        self.engine, self.started, self.synced_step = None, False, NOT_SENT
        self.weight_check = self._make_weight_check()
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)
            self.thread = None


def is_on_policy(args: SEKDConfig, step: int) -> bool:
    """Whether an optimizer step learns from rollouts: a random draw per step, with probability ``lmbda``."""
    return random.Random(f"{args.seed}/{step}").random() < args.lmbda_schedule.value(step)


def _generate_timed(engine: Any, prompts: list[list[int]], sampling: Sampling | None = None) -> Timed:
    started = time.monotonic()
    rollouts = engine.generate(prompts) if sampling is None else engine.generate_with(prompts, sampling)
    return rollouts, time.monotonic() - started


def _run_inline(function: Callable[..., Timed], *arguments: Any) -> Future[Timed]:
    """Like a thread's ``submit``, but in this thread. An engine's error is raised when the result is read."""
    job: Future[Timed] = Future()
    try:
        job.set_result(function(*arguments))
    except (RolloutError, RolloutConfigError) as error:
        job.set_exception(error)
    return job


def _get_prompts(samples: Iterable[Sample]) -> list[list[int]]:
    return [sample.input_ids[: sample.prompt_length] for sample in samples]
