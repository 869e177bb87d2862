"""Policies that learn from one optimizer step to the next: a global threshold, and a bandit.

Both choose every part of a step (micro-batch, process) with the state from before it, and change it in ``end_step``.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sekd.ranking import Generators, Scores, Valid, Weights, check_finite, top_k
from sekd.types import Batch


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


FEATURES = ("student_entropy", "teacher_entropy", "student_ce", "teacher_ce", "kl")
"""The scores that the bandit reads; its sixth feature is the relative position of the row in its sequence."""


class Bandit:
    """A learned selector: LinUCB over six features of a row (Li et al., 2010; SampledKD's selector).

    1/K on the K rows of highest theta.x + ``alpha`` sqrt(x' A^-1 x), with A = ``ridge`` I + sum x x', theta = A^-1 b
    and b = sum r x over all rows chosen so far. A row's reward r is the drop of its KL(p || q) by the optimizer step,
    clipped to [-5, 5]. It costs one more pass of the student's backbone over the step's batches, without gradient,
    and of both heads over the chosen rows.
    """

    def __init__(self, fraction: float = 0.2, alpha: float = 1.0, ridge: float = 1.0) -> None:
        self.fraction, self.alpha = fraction, alpha
        self.A = ridge * torch.eye(len(FEATURES) + 1, dtype=torch.float64)
        self.b = torch.zeros(len(FEATURES) + 1, dtype=torch.float64)
        self._features: list[Tensor] = []
        self.chosen: list[tuple[Batch, Bool[Tensor, " N"], tuple[Tensor, ...]]] = []

    def __call__(
        self, scores: Float[Tensor, "B T 5"], valid: Valid, step: int = 0, generator: Generators = None
    ) -> Weights:
        position = (valid.cumsum(1) - 1) / valid.sum(1, keepdim=True).clamp(min=1)
        x = torch.cat([scores.double(), position[..., None].double()], dim=-1)
        inverse = self.A.inverse().to(x.device)
        theta = inverse @ self.b.to(x.device)
        bonus = torch.einsum("...i,ij,...j->...", x, inverse, x).clamp(min=0).sqrt()
        weights = top_k((x @ theta + self.alpha * bonus).to(scores.dtype), valid, self.fraction)
        self._features.append(x[weights > 0].cpu())
        return weights

    def remember(self, batch: Batch, chosen: Bool[Tensor, " N"], teacher_rows: tuple[Tensor, ...]) -> None:
        """What the reward needs of a part of the step: which of its N valid rows were chosen, and the teacher's."""
        self.chosen.append((batch, chosen, teacher_rows))

    def end_step(self, kl_after: list[Tensor], reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Learn from the KL of the chosen rows after the step, one tensor a part; ``reduce`` sums over processes."""
        update = torch.zeros(len(self.b), len(self.b) + 1, dtype=torch.float64)
        for x, after in zip(self._features, kl_after, strict=True):
            reward = (x[:, FEATURES.index("kl")] - after.double().cpu()).clamp(-5, 5)
            update += x.T @ torch.cat([x, reward[:, None]], dim=1)
        update = reduce(update)
        self.A, self.b = self.A + update[:, :-1], self.b + update[:, -1]
        self._features, self.chosen = [], []

    def state_dict(self) -> dict[str, Tensor]:
        return {"A": self.A, "b": self.b}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.A, self.b = state["A"], state["b"]


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
