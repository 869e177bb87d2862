"""Global selection by a threshold that recent batches share."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from sekd.policies.base import FinishedStep, PositionPolicy
from sekd.policies.ranks import Generators, Scores, Valid, Weights, check_finite, top_k


class Gls(PositionPolicy):
    """Global-level selection: positions whose score reaches a shared threshold (Wang et al., 2021).

    The threshold is the (1 - k) quantile of the last ``queue_size`` valid scores *before* this batch. The first batch
    falls back to :func:`top_k`. The weights make the loss the mean over the selected positions of the batch.

    With ``whole_steps`` a batch is a part of an optimizer step: each selected position gets weight 1, and the caller
    multiplies the step's gradient by sequences / ``selected``. The queue changes when the step ends.
    """

    mean_over: ClassVar[str] = "step"

    def __init__(self, fraction: float = 0.2, whole_steps: bool = False, queue_size: int = 30_000) -> None:
        super().__init__(fraction, whole_steps)
        self.queue_size = queue_size
        self.queue = torch.empty(0)
        self._pending: list[Tensor] = []
        self._set_threshold()

    def _set_threshold(self) -> None:
        """Set tau, the threshold: None before the first batch."""
        self.threshold: float | None = None
        if len(self.queue):
            low = -float("inf")  # k = 1 chooses all positions, also a new lowest score
            self.threshold = float(self.queue.double().quantile(1 - self.fraction)) if self.fraction < 1 else low
        self.selected = None if self.threshold is None else 0

    def __call__(self, scores: Scores, valid: Valid, step: int = 0, generator: Generators = None) -> Weights:
        # A non-finite score would spoil the threshold as long as it stays in the queue.
        check_finite(scores, valid)
        weights = self._weigh(scores, valid)
        self._pending.append(scores[valid].detach().float().cpu())
        if not self.whole_steps:
            self.end_step(FinishedStep())
        return weights

    def _weigh(self, scores: Scores, valid: Valid) -> Weights:
        if self.threshold is None or self.selected is None:
            return top_k(scores, valid, self.fraction)
        chosen = valid & (scores >= self.threshold)
        if not self.whole_steps:
            return chosen * (valid.any(1).sum() / chosen.sum().clamp(min=1))
        self.selected += int(chosen.sum())
        return chosen.to(scores.dtype)

    def end_step(self, step: FinishedStep) -> None:
        """Add the step's scores to the queue. The oldest scores leave."""
        # Micro-batch by micro-batch, and process by process within each: the order of a run with one process.
        all_processes = step.gather([self._pending])
        scores = [part for parts in zip(*all_processes, strict=True) for part in parts]
        self.queue = torch.cat([self.queue, *scores])[-self.queue_size :]
        self._pending = []
        self._set_threshold()

    def state_dict(self) -> dict[str, Tensor]:
        return {"queue": self.queue}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.queue = state["queue"]
        self._set_threshold()
