"""A Trainer that logs means over its steps, where the time went, and how near that is to the arithmetic."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from sekd.floor import Floor
from sekd.hardware import measure_memory
from sekd.metrics import add_sums, compute_means, compute_speed, name_divergence, sum_all, sum_up_time
from sekd.profiling import Profiling
from sekd.resumable import ResumableTrainer
from sekd.timing import PARTS, Stopwatch, timed, untimed

OF_RUN = (*(f"{part}_seconds" for part in PARTS), "flops", "floor_seconds", "seconds")
"""The sums that the run's last log reads, over the whole run."""


class MeasuredTrainer(ResumableTrainer):
    """``ResumableTrainer`` whose logs are means over the steps since the last one, over all processes.

    A subclass sets ``floor`` before it trains. Sums and seconds are in the checkpoints, so a resumed run logs what an
    undisturbed one would. Evaluation does not count. Seconds are means over the processes.
    """

    floor: Floor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stopwatch = Stopwatch(self.args.device)
        self._sums: defaultdict[str, Tensor | float] = defaultdict(float)
        self._run_sums: defaultdict[str, float] = defaultdict(float)
        self._last_log = time.monotonic()
        self.add_callback(_EndOfOptimizer(self))
        self.profiling = Profiling(self.args.profile, self.stopwatch, self.uncounted)
        if self.args.profile and self.is_world_process_zero():
            self.add_callback(self.profiling)

    def more_logs(self) -> dict[str, float]:
        """What the subclass adds to the log of the last step."""
        return {}

    def count(self, **sums: float) -> None:
        """Add to the sums of the next log."""
        add_sums(self._sums, sums)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with self.stopwatch.running():
                return super().train(*args, **kwargs)
        finally:
            self.profiling.close()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        with timed("backward"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.stopwatch.open("optimizer")  # until the optimizer's step has ended
        return loss

    def end_optimizer(self) -> None:
        """Called after the optimizer's step."""
        self.stopwatch.close_all()
        self.floor.count_step()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Around what is no part of training."""
        started = time.monotonic()
        with untimed():
            yield
        self._last_log += time.monotonic() - started

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As ``Trainer.log``; a log of steps gets their means, and the last log the seconds of the run."""
        if "loss" in logs and self._sums:
            sums, seconds = self._sum_up()
            logs |= compute_means(sums, seconds, name_divergence(self.args)) | compute_speed(sums, seconds)
            logs |= self.more_logs()
            self._add_to_run(_of_run(sums, seconds))
            logs["train_seconds"] = self._run_sums["seconds"]
            self._sums.clear()
            self._last_log = time.monotonic()
        elif "train_loss" in logs:
            rest = _of_run(*self._sum_up())
            logs |= sum_up_time({name: self._run_sums[name] + value for name, value in rest.items()})
            logs["peak_memory_gb"] = measure_memory() / 1e9
        super().log(logs, start_time)

    def _sum_up(self) -> tuple[dict[str, float], float]:
        """The sums of the steps since the last log over all processes, and the seconds since then."""
        sums = self._gather_sums()
        of_rollouts = self.floor.of_rollouts(sums)
        return {**sums, **{n: sums[n] + more for n, more in of_rollouts.items()}}, time.monotonic() - self._last_log

    def _add_to_run(self, sums: Mapping[str, float]) -> None:
        for name, value in sums.items():
            self._run_sums[name] += value

    def _gather_sums(self) -> dict[str, float]:
        processes = self.args.world_size
        seconds = {f"{part}_seconds": value / processes for part, value in self.stopwatch.take().items()}
        floor = self.floor.take()
        self.count(**seconds, **{n: v / (processes if n == "floor_seconds" else 1) for n, v in floor.items()})
        return sum_all(self._sums, self.accelerator)

    # Checkpoints

    def begin(self, checkpoint: str | None) -> None:
        """Begin without sums; :meth:`restore_log` then takes the sums of a checkpoint."""
        self.stopwatch.take()
        self.floor.take()
        self._sums.clear()
        self._run_sums.clear()
        self._last_log = time.monotonic()

    def export_log(self) -> dict[str, Any]:
        """The sums of the steps since the last log, the seconds since then, and the sums of the run before."""
        sums = self._gather_sums()
        return {**sums, "seconds": time.monotonic() - self._last_log, "run": dict(self._run_sums)}

    def restore_log(self, state: dict[str, Any]) -> None:
        """Take the sums that :meth:`export_log` gave. They are of all processes, so the main process takes them."""
        self._last_log -= state.pop("seconds")
        self._add_to_run(state.pop("run"))
        if self.accelerator.is_main_process:
            self.count(**state)


def _of_run(sums: Mapping[str, float], seconds: float) -> dict[str, float]:
    return {name: value for name, value in {**sums, "seconds": seconds}.items() if name in OF_RUN}


class _EndOfOptimizer(TrainerCallback):
    def __init__(self, trainer: MeasuredTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end_optimizer()
