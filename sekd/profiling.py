"""``profile: N`` records what N optimizer steps do: a trace of every operation, and how much memory they hold."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from transformers import TrainerCallback
from transformers.utils import logging

from sekd.files import write_atomically
from sekd.timing import Stopwatch

logger = logging.get_logger(__name__)

FOLDER, TRACE, MEMORY, CURVE = "profile", "trace.json", "memory.pickle", "memory.csv"
WARM_UP = 2
"""Steps before the recorded ones, if the run has as many. The first steps allocate memory and load kernels."""

MAX_EVENTS = 1_000_000
"""Allocations that the memory snapshot keeps: the last ones."""


class Profiling(TrainerCallback):
    """Records ``steps`` optimizer steps, with what lies between them, into ``output_dir/profile``.

    The trace names the parts of :mod:`sekd.timing`. ``memory.csv`` has the bytes that PyTorch allocated since the first
    recorded step and still holds, against the seconds (arXiv 2602.01395, figure 8). On CUDA there is a memory snapshot
    too. The time to write the files is ``uncounted``.
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
        curve = sum_allocations(_list_allocations(profiler, "CUDA" if self.on_cuda else "CPU"))
        lines = [f"{seconds:.6f},{size}\n" for seconds, size in curve]
        write_atomically(os.path.join(self.folder, CURVE), "seconds,bytes\n" + "".join(lines))
        if self.on_cuda:
            torch.cuda.memory._dump_snapshot(os.path.join(self.folder, MEMORY))
            torch.cuda.memory._record_memory_history(enabled=None)
        memory = f"{CURVE} and {MEMORY} have" if self.on_cuda else f"{CURVE} has"
        logger.warning(f"profiled {self.done - self.warm_up} steps: {self.folder}/{TRACE}; {memory} the memory")


def _list_allocations(profiler: profile, device: str) -> list[tuple[int, int]]:
    """The time in nanoseconds, and the bytes, of each allocation on a kind of device; negative where they are freed."""
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    return sorted((event.start_ns(), event.nbytes()) for event in events if event.device_type().name == device)


def sum_allocations(changes: Sequence[tuple[int, int]]) -> list[tuple[float, int]]:
    """The seconds since the first change, and the bytes that are held then. ``changes`` are nanoseconds and bytes."""
    totals = accumulate(size for _, size in changes)
    return [((time - changes[0][0]) / 1e9, total) for (time, _), total in zip(changes, totals, strict=True)]
