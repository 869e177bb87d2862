"""Where a run's time goes: the seconds of each of its parts.

``with timed("teacher"):`` stands in the code of a part. A :class:`Stopwatch` that is running in this thread measures
it, and without one nothing happens. On CUDA it records events and never waits for the device in a step. The seconds
then are the device's.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

PARTS = ("data", "generation", "sync", "teacher", "student", "scoring", "loss", "backward", "optimizer")
"""The parts of a step. ``student`` is its forward pass, ``backward`` the rest of its micro-batch."""

_running: ContextVar["Stopwatch | None"] = ContextVar("_running", default=None)


class Stopwatch:
    """Adds up the seconds of each part. In a part within another one, the inner part's seconds count alone.

    ``label`` opens a named range of a profiler for a part; None while none runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.label: Any = None
        self._open: list[str] = []
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._last: Any = None
        self._events: deque[tuple[str, Any, Any]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what runs in the block, in this thread."""
        self._open = []
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)

    def open(self, part: str) -> None:
        """Begin a part, within the part that is open."""
        self._mark()
        self._open.append(part)

    def close(self) -> None:
        """End the part that was opened last."""
        self._mark()
        self._open.pop()

    def close_all(self) -> None:
        """End every part that is open."""
        self._mark()
        self._open.clear()

    def take(self) -> dict[str, float]:
        """The seconds of each part since the last call. On CUDA it waits for the last event."""
        while self._events:
            part, start, end = self._events.popleft()
            end.synchronize()
            self._seconds[part] += start.elapsed_time(end) / 1000
        seconds, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return seconds

    def _mark(self) -> None:
        """Give the time since the last mark to the part that is open."""
        now: Any
        if self.on_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        if self._open and self.on_cuda:
            self._events.append((self._open[-1], self._last, now))
        elif self._open:
            self._seconds[self._open[-1]] += now - self._last
        self._last = now
        while self._events and self._events[0][2].query():  # so that few events live at once
            part, start, end = self._events.popleft()
            self._seconds[part] += start.elapsed_time(end) / 1000


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Measure a block, or each call of a function, as one of :data:`PARTS`."""
    watch = _running.get()
    if watch is None:
        yield
        return
    watch.open(part)
    try:
        if watch.label is None:
            yield
        else:
            with watch.label(part):
                yield
    finally:
        watch.close()


@contextmanager
def untimed() -> Iterator[None]:
    """Measure nothing in the block, in this thread."""
    token = _running.set(None)
    try:
        yield
    finally:
        _running.reset(token)
