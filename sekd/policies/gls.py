"""Policies that learn from one optimizer step to the next: a global threshold, and a bandit.

Both choose every part of a step (micro-batch, process) with the state from before it, and change it in ``end_step``.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sekd.policies.bandit import Bandit
from sekd.policies.ranks import Generators, Scores, Valid, Weights, check_finite, top_k


class Gls:
    """Global-level selection: rows whose score reaches a threshold that recent batches share (Wang et al., 2021).

    The threshold is the (1 - k) quantile of the last ``queue_size`` valid scores *before* this batch; the first batch
    falls back to :func:`top_k`. Weights are those of a mean over the batch's selected rows: sequences / rows on each.

    With ``whole_steps`` set, the batch is an optimizer step that comes in parts: each part gets weight 1 a selected
    row, the caller scales the step's gradient by sequences / ``selected``, and the queue changes in :meth:`end_step`.
    """

    def __init__(self, fraction: float = 0.2, queue_size: int = 30_000) -> None:
        self.fraction, self.queue_size, self.whole_steps = fraction, queue_size, False
        self.queue = torch.empty(0)
        self.selected = 0
        self._waiting: list[Tensor] = []
        self._set_threshold()

    def _set_threshold(self) -> None:
        """tau; None before the first batch."""
        self.threshold: float | None = None
        if len(self.queue):
            low = -float("inf")  # all rows, also those under every score seen
            self.threshold = float(self.queue.double().quantile(1 - self.fraction)) if self.fraction < 1 else low

    def __call__(self, scores: Scores, valid: Valid, step: int = 0, generator: Generators = None) -> Weights:
        check_finite(scores, valid)  # one of them would poison the threshold for as long as it is in the queue
        weights = self._weigh(scores, valid)
        self._waiting.append(scores[valid].detach().float().cpu())
        if not self.whole_steps:
            self.end_step()
        return weights

    def _weigh(self, scores: Scores, valid: Valid) -> Weights:
        if self.threshold is None:
            return top_k(scores, valid, self.fraction)
        chosen = valid & (scores >= self.threshold)
        if not self.whole_steps:
            return chosen * (valid.any(1).sum() / chosen.sum().clamp(min=1))
        self.selected += int(chosen.sum())
        return chosen.to(scores.dtype)

    def end_step(self, gather: Callable[[list], list] = list) -> None:
        """Add the step's scores to the queue; the oldest leave. ``gather`` joins the lists of all processes."""
        # Part by part, and within a part rank by rank: the order in which one process would have seen them.
        every_rank = gather([self._waiting])
        scores = [part for parts in zip(*every_rank, strict=True) for part in parts]
        self.queue = torch.cat([self.queue, *scores])[-self.queue_size :]
        self._waiting, self.selected = [], 0
        self._set_threshold()

    def state_dict(self) -> dict[str, Tensor]:
        return {"queue": self.queue}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.queue = state["queue"]
        self._set_threshold()


STATEFUL: dict[str, Any] = {"gls": Gls, "bandit": Bandit}


STATE_FILE = "position_policy.pt"


def save_state(policy: Any, folder: str) -> None:
    """Put the state of a policy that has one into a checkpoint folder, which is made if it is not there."""
    for name, kind in STATEFUL.items():
        if isinstance(policy, kind):
            os.makedirs(folder, exist_ok=True)
            torch.save({name: policy.state_dict()}, os.path.join(folder, STATE_FILE))


def load_state(policy: Any, folder: str) -> None:
    """Give a policy that has a state the one in a checkpoint folder.

    Raises:
        ValueError: the checkpoint has none, or that of another policy.
    """
    path = os.path.join(folder, STATE_FILE)
    for name, kind in STATEFUL.items():
        if not isinstance(policy, kind):
            continue
        states = torch.load(path, weights_only=True) if os.path.exists(path) else {}
        if name not in states:
            raise ValueError(
                f"checkpoint {folder!r} has no state of position_policy {name!r}: it was made with "
                f"{', '.join(states) or 'another policy'}; resume with that one, or start anew"
            )
        policy.load_state_dict(states[name])
