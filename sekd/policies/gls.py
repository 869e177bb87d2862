"""Global selection by a threshold that recent batches share."""

from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from sekd.policies.base import FinishedStep, PositionPolicy
from sekd.policies.ranks import Generators, Scores, Valid, Weights, check_finite, top_k
from sekd.schedules import Schedule


class Gls(PositionPolicy):
    """Global-level selection: positions whose score reaches a shared threshold (Wang et al., 2021).

    The threshold is the (1 - k) quantile of the last ``queue_size`` valid scores *before* this batch. The first batch
    falls back to :func:`top_k`. The weights make the loss the mean over the selected positions of the batch.

    With ``whole_steps`` a batch is a part of an optimizer step: each selected position gets weight 1, and the caller
    multiplies the step's gradient by sequences / ``selected``. The queue changes when the step ends.
    """

    mean_over: ClassVar[str] = "step"

    def __init__(self, fraction: float | Schedule = 0.2, whole_steps: bool = False, queue_size: int = 30_000) -> None:
        super().__init__(fraction, whole_steps)
        self.queue_size = queue_size
        self.queue = torch.empty(0)
        self._pending: list[list[float]] = []
        self._begin_step()

    def _begin_step(self) -> None:
        self._threshold: float | None = None  # its fraction is known in the step
        self.selected = 0 if len(self.queue) else None

    def get_threshold(self, step: int) -> float | None:
        """Tau, the threshold of a step: None before the first scores are in the queue."""
        if self._threshold is None and len(self.queue):
            k, low = self.fraction.value(step), -float("inf")  # k = 1 chooses all positions, also a new lowest score
            self._threshold = float(self.queue.double().quantile(1 - k)) if k < 1 else low
        return self._threshold

    def __call__(self, scores: Scores, valid: Valid, step: int = 0, generator: Generators = None) -> Weights:
        # A non-finite score would spoil the threshold as long as it stays in the queue.
        check_finite(scores, valid)
        weights = self._weigh(scores, valid, step)
        by_sequence = scores[valid].detach().float().cpu().split(valid.sum(1).tolist())
        self._pending += [scores_of_one.tolist() for scores_of_one in by_sequence]
        if not self.whole_steps:
            self.end_step(FinishedStep())
        return weights

    def _weigh(self, scores: Scores, valid: Valid, step: int) -> Weights:
        threshold = self.get_threshold(step)
        if threshold is None or self.selected is None:
            return top_k(scores, valid, self.fraction.value(step))
        chosen = valid & (scores >= threshold)
        if not self.whole_steps:
            return chosen * (valid.any(1).sum() / chosen.sum().clamp(min=1))
        self.selected += int(chosen.sum())
        return chosen.to(scores.dtype)

    def end_step(self, step: FinishedStep) -> None:
        """Add the step's scores to the queue. The oldest scores leave."""
        sequences = [scores for of_process in step.gather([self._pending]) for scores in of_process]
        # The queue may keep a part of them. Which part must not depend on micro-batches and processes.
        sequences.sort(key=lambda scores: (len(scores), scores))
        self.queue = torch.cat([self.queue, torch.tensor([*chain(*sequences)])])[-self.queue_size :]
        self._pending = []
        self._begin_step()

    def state_dict(self) -> dict[str, Tensor]:
        return {"queue": self.queue}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.queue = state["queue"]
        self._begin_step()
