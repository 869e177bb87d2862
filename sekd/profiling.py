"""``profile: N`` records what N optimizer steps do: a trace of every operation, and on CUDA the memory."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from transformers import TrainerCallback
from transformers.utils import logging

from sekd.timing import Stopwatch

logger = logging.get_logger(__name__)

FOLDER, TRACE, MEMORY = "profile", "trace.json", "memory.pickle"
WARM_UP = 2
"""Steps before the recorded ones, if the run has as many. The first steps allocate memory and load kernels."""

MAX_EVENTS = 1_000_000
"""Allocations that the memory snapshot keeps: the last ones."""


class Profiling(TrainerCallback):
    """Records ``steps`` optimizer steps, with what lies between them, into ``output_dir/profile``.

    The trace names the parts of :mod:`sekd.timing`. Without CUDA there is no memory snapshot: the trace has each
    allocation instead. The time to write them is ``uncounted``.
    """

    def __init__(self, steps: int, stopwatch: Stopwatch, uncounted: Callable[[], AbstractContextManager]) -> None:
        self.steps, self.stopwatch, self.uncounted = steps, stopwatch, uncounted
        self.profiler: profile | None = None
        self.done = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        left = state.max_steps - state.global_step
        self.done, self.warm_up = 0, max(0, min(WARM_UP, left - self.steps))
        self.folder = os.path.join(str(args.output_dir), FOLDER)
        self.on_cuda = torch.cuda.is_available() and not args.use_cpu
        skipped, warming = max(self.warm_up - 1, 0), min(self.warm_up, 1)
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_cuda else [])],
            schedule=schedule(skip_first=skipped, wait=0, warmup=warming, active=self.steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
            acc_events=True,
        )
        self.profiler.start()
        self._begin_if_warm()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiler is None:
            return
        self.done += 1
        self._begin_if_warm()
        with self.uncounted():
            self.profiler.step()  # after the last recorded step, it writes
        if self.done == self.warm_up + self.steps:
            self.close()

    def close(self) -> None:
        """End recording, and write what was recorded: the run is over."""
        if self.profiler is not None:
            profiler, self.profiler = self.profiler, None
            profiler.stop()
            self.stopwatch.label = None

    def _begin_if_warm(self) -> None:
        if self.done == self.warm_up:
            self.stopwatch.label = record_function
            if self.on_cuda:
                torch.cuda.memory._record_memory_history(max_entries=MAX_EVENTS)

    def _write(self, profiler: profile) -> None:
        os.makedirs(self.folder, exist_ok=True)
        profiler.export_chrome_trace(os.path.join(self.folder, TRACE))
        if self.on_cuda:
            torch.cuda.memory._dump_snapshot(os.path.join(self.folder, MEMORY))
            torch.cuda.memory._record_memory_history(enabled=None)
        memory = f"{MEMORY} has the memory" if self.on_cuda else "no CUDA, so no memory snapshot"
        logger.warning(f"profiled {self.done - self.warm_up} steps: {self.folder}/{TRACE}; {memory}")
