"""A policy that learns which positions pay."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sekd.policies.ranks import Generators, Valid, Weights, top_k
from sekd.types import Batch

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
