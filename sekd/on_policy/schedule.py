"""Rounds of generation: which optimizer steps are on-policy, when their rollouts are written, and by which weights."""

import json
import os
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from rollouts import Rollout, RolloutConfigError, RolloutEngine, RolloutError, VLLMServerEngine
from sekd.config import SEKDConfig
from sekd.data.batch import Sample, from_rollout
from sekd.distributions import entropy_from_top
from sekd.files import write_atomically
from sekd.models import count_classes
from sekd.on_policy.engines import check_served, make_engine, sync
from sekd.on_policy.record import _as_line, _as_state, _from_state, _lines_before, show_completions

logger = logging.get_logger(__name__)


Parts = list[list[Sample]]
"""The samples of an optimizer step, micro-batch by micro-batch."""


Timed = tuple[list[Rollout], float]
"""Rollouts, and the seconds that they took."""


@dataclass
class Step:
    """An optimizer step of a round; ``rollouts`` are those of its samples, None where it learns from the data."""

    number: int
    parts: Parts
    rollouts: list[Rollout] | None = None


@dataclass
class _Round:
    """Steps whose rollouts were asked for; ``answer`` waits for those that are not known already."""

    steps: list[Step]
    answer: Callable[[], Timed]


class RolloutSchedule:
    """The optimizer steps of a run, the on-policy ones with completions by the student.

    A round is one call of the engine, for the on-policy ones of ``rollout_batches`` steps. With ``rollout_staleness``
    1 the next round is written, by the weights of now, while this one is trained on. Rollouts are then up to
    2 ``rollout_batches`` - 1 steps old, else ``rollout_batches`` - 1. What was written and not yet trained on is part
    of a checkpoint, so that a resumed run learns from the same rollouts.
    """

    def __init__(self, trainer: Any, engine: RolloutEngine | None) -> None:
        self.trainer, self.engine = trainer, engine
        self.args: SEKDConfig = trainer.args
        self.ready: deque[Step] = deque()
        self.under_way: _Round | None = None
        self.known: dict[int, list[Rollout]] = {}
        self.started, self.synced = False, -1
        self.thread: ThreadPoolExecutor | None = None
        self.job: Future[Timed] | None = None
        # One process speaks to the servers for all of them; transformers generates in each.
        self.joint = self.args.world_size > 1 and self.args.rollout_engine != "hf"

    def next_step(self, number: int, pull: Callable[[], Parts]) -> Parts:
        """The samples of optimizer step ``number``; ``pull`` gives those of the data's next step, none at its end.

        Raises:
            RolloutError: the engine gave no completions.
        """
        started = time.monotonic()
        if not self.ready:
            this, self.under_way = self.under_way or self._start(number, pull, False), None
            self.ready = deque(self._finish(this))
            if self.args.rollout_staleness and self.ready:
                ahead = self._start(number + len(self.ready), pull, True)
                self.under_way = ahead if ahead.steps else None  # none at the end of an epoch
        self.trainer.count(rollout_wait=(time.monotonic() - started) / self.args.world_size)
        if not self.ready:
            return []
        step = self.ready.popleft()
        if step.rollouts is None:
            return step.parts
        self._record(step, step.rollouts)
        written = iter(step.rollouts)
        return [[self._sample(sample, next(written)) for sample in part] for part in step.parts]

    def _start(self, number: int, pull: Callable[[], Parts], background: bool) -> _Round:
        """Draw the steps of the round that begins with step ``number``, and ask for their rollouts."""
        batches, steps = self.args.rollout_batches, list[Step]()
        end = min(number + batches - number % batches, self.trainer.state.max_steps)
        while number + len(steps) < end and (parts := pull()):
            step = Step(number + len(steps), parts)
            step.rollouts = self._known_of(step) if is_on_policy(self.args, step.number) else None
            steps.append(step)
        due = [sample for step in steps if step.rollouts == [] for sample in _samples(step)]
        if not due:  # a round of all processes: they draw as many steps, and know rollouts of the same ones
            return _Round(steps, lambda: ([], 0.0))
        return _Round(steps, self._ask(due, self.trainer.state.global_step, background))

    def _known_of(self, step: Step) -> list[Rollout]:
        """The rollouts that a checkpoint has for a step; none if it has none."""
        rollouts = self.known.pop(step.number, [])
        if rollouts and [rollout.prompt_ids for rollout in rollouts] != [_prompt(s) for s in _samples(step)]:
            raise ValueError(
                f"the checkpoint's rollouts for step {step.number} are of other prompts; resume with the same data, "
                "seed and batch sizes"
            )
        return rollouts

    def _finish(self, this: _Round) -> list[Step]:
        rollouts, seconds = this.answer()
        self.trainer.count(
            rollouts=len(rollouts), rollout_tokens=sum(len(r.completion_ids) for r in rollouts), rollout_seconds=seconds
        )
        written = iter(rollouts)
        for step in this.steps:
            if step.rollouts == []:
                step.rollouts = [next(written) for _ in _samples(step)]
                if [rollout.prompt_ids for rollout in step.rollouts] != [*map(_prompt, _samples(step))]:
                    raise RolloutConfigError("the rollout engine answered other prompts than asked, or in other order")
        return this.steps

    def _record(self, step: Step, rollouts: list[Rollout]) -> None:
        """What is counted, shown and kept of rollouts when they are trained on."""
        self.trainer.count(
            trained_rollouts=len(rollouts),
            stale_steps=sum(step.number - rollout.weights_step for rollout in rollouts),
            cut_rollouts=sum(rollout.finish_reason == "length" for rollout in rollouts),
            empty_rollouts=sum(not rollout.completion_ids for rollout in rollouts),
        )
        tokenizer, every = self.trainer.processing_class, self.args.log_completions_steps
        if every and step.number % every == 0 and self.trainer.is_world_process_zero():
            show_completions(tokenizer, rollouts[:2], step.number)
        if self.args.save_rollouts:
            lines = [
                _as_line(step.number, *pair, tokenizer=tokenizer) for pair in zip(_samples(step), rollouts, strict=True)
            ]
            os.makedirs(str(self.args.output_dir), exist_ok=True)
            with open(self._file(), "a") as file:
                file.write("".join(lines))

    def _sample(self, sample: Sample, rollout: Rollout) -> Sample:
        if rollout.top_logprobs is None:
            return from_rollout(sample, rollout)
        classes = self.trainer.method.vocab or count_classes(self.trainer.model)
        return from_rollout(sample, rollout, entropy_from_top(torch.from_numpy(rollout.top_logprobs), classes).tolist())

    # The engine

    def generate(self, samples: Sequence[Sample], step: int) -> list[Rollout]:
        """A completion of each sample's prompt by the student as it is now; ``step`` is recorded in them."""
        return self._ask(samples, step, False)()[0]

    def _ask(self, samples: Sequence[Sample], step: int, background: bool) -> Callable[[], Timed]:
        """Have completions written; what is returned waits for them."""
        if self.job is not None:
            wait([self.job])  # an engine does one thing at a time
        prompts = [*map(_prompt, samples)]
        everyone = gather_object([prompts]) if self.joint else [prompts]
        mine = self.trainer.accelerator.process_index if self.joint else 0
        flat = [prompt for of_process in everyone for prompt in of_process]
        self._send_weights(step, flat)
        if self.engine is not None:
            if background:
                self.thread = self.thread or ThreadPoolExecutor(1)
                self.job = self.thread.submit(_timed, self.engine, flat)
            else:
                with self.trainer.accelerator.autocast():
                    self.job = _now(_timed, self.engine, flat)
        first = sum(map(len, everyone[:mine]))
        return partial(self._answer, self.job, slice(first, first + len(prompts)))

    def _answer(self, job: Future[Timed] | None, mine: slice) -> Timed:
        """A job's rollouts; with several processes the one that has it sends each its part, or the error."""
        if not self.joint:
            assert job is not None
            return job.result()
        rollouts, seconds = self._of_leader(None if job is None else job.exception() or job.result())
        return rollouts[mine], seconds / self.args.world_size  # the log adds them up over processes

    def _of_leader(self, found: Any) -> Any:
        """What the process with the engine found; an error is raised in all, so that none waits for the others."""
        if isinstance(found, BaseException):  # as one that travels
            found = (RolloutError if isinstance(found, RolloutError) else RolloutConfigError)(str(found))
        box = [found]
        if self.joint:
            broadcast_object_list(box)
        if isinstance(box[0], BaseException):
            raise box[0]
        return box[0]

    def _send_weights(self, step: int, prompts: list[list[int]]) -> None:
        """All processes do the same here: they may have to gather the student's weights."""
        trainer = self.trainer
        found: Any = 0
        if self.engine is None and (not self.joint or trainer.accelerator.is_main_process):
            try:
                self.engine = make_engine(trainer.model, trainer.processing_class, self.args)
            except (RolloutError, RolloutConfigError) as error:
                found = error
        if self.engine is not None:
            found = getattr(self.engine, "lora_rank", 0)
        room = self._of_leader(found)
        is_new, self.started = not self.started, True
        if is_new or step != self.synced or step < 0:
            sync(self.engine, trainer.model_wrapped, step, room)
            self.synced = step
        if is_new and (self.joint or isinstance(self.engine, VLLMServerEngine)):
            with trainer.accelerator.autocast():
                check_served(self.engine, trainer.model, prompts)

    # What outlives the process

    def begin(self, checkpoint: str | None) -> None:
        """Start anew, or with what a checkpoint has of rollouts that were not trained on yet."""
        self.ready.clear()
        self.under_way, self.known, self.synced, done = None, {}, -1, 0
        if checkpoint:
            with open(os.path.join(checkpoint, TRAINER_STATE_NAME)) as file:
                done = json.load(file)["global_step"]
        path = os.path.join(checkpoint, self._state_file()) if checkpoint else ""
        if os.path.exists(path):
            states = torch.load(path, weights_only=True)
            self.known = {number: [*map(_from_state, rollouts)] for number, rollouts in states.items()}
        if not self.args.save_rollouts:
            return
        if checkpoint:
            write_atomically(self._file(), "".join(_lines_before(self._file(), done)))
        elif os.path.exists(self._file()):
            os.replace(self._file(), self._file() + ".old")
            logger.warning(f"the rollouts of an earlier run are in {self._file()}.old now")

    def save(self, folder: str) -> None:
        """Put rollouts that were written and not trained on yet into a checkpoint folder."""
        ahead = [*self.ready]
        if self.under_way is not None:
            with suppress(RolloutError):  # it comes again where the round is due
                finished = self._finish(self.under_way)
                self.under_way = _Round(finished, lambda: ([], 0.0))
                ahead += finished
        state = {step.number: [_as_state(r) for r in step.rollouts] for step in ahead if step.rollouts is not None}
        if state:
            os.makedirs(folder, exist_ok=True)
            torch.save(state, os.path.join(folder, self._state_file()))

    def _state_file(self) -> str:
        return f"rollouts_{self.args.process_index}.pt"

    def _file(self) -> str:
        rank = f"_{self.args.process_index}" if self.args.process_index else ""
        return os.path.join(str(self.args.output_dir), f"rollouts{rank}.jsonl")

    def close(self) -> None:
        """End the engine, whatever it is doing."""
        if self.engine is not None:
            self.engine.close()
        self.engine, self.started, self.synced = None, False, -1
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)
            self.thread = None


def is_on_policy(args: SEKDConfig, step: int) -> bool:
    """Whether an optimizer step learns from rollouts: a draw of its own, with probability ``lmbda``."""
    return random.Random(f"{args.seed}/{step}").random() < args.lmbda


def _timed(engine: RolloutEngine, prompts: list[list[int]]) -> Timed:
    started = time.monotonic()
    return engine.generate(prompts), time.monotonic() - started


def _now(work: Callable[..., Timed], *arguments: Any) -> Future[Timed]:
    """As a thread's ``submit``, here and now: what fails does so where the result is asked for."""
    job: Future[Timed] = Future()
    try:
        job.set_result(work(*arguments))
    except (RolloutError, RolloutConfigError) as error:
        job.set_exception(error)
    return job


def _samples(step: Step) -> list[Sample]:
    return [sample for part in step.parts for sample in part]


def _prompt(sample: Sample) -> list[int]:
    return sample.input_ids[: sample.prompt_length]
