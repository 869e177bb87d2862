"""A policy that learns which positions lower the KL most."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sekd.policies.base import FinishedStep, PositionPolicy
from sekd.policies.ranks import Generators, Valid, Weights, top_k
from sekd.schedules import Schedule
from sekd.types import Batch, TeacherState

FEATURES = ("student_entropy", "teacher_entropy", "student_ce", "teacher_ce", "kl")
"""The scores that the bandit reads. Its sixth feature is the relative place of the position in its sequence."""


class Bandit(PositionPolicy):
    """A learned selector: LinUCB over six features of a position (Li et al., 2010; SampledKD's selector).

    1/K on the K positions of highest theta.x + ``alpha`` sqrt(x' A^-1 x), with A = ``ridge`` I + sum x x',
    theta = A^-1 b and b = sum r x over all positions chosen so far. The reward r of a position is how much
    the optimizer step lowers its KL(p || q), clipped to [-5, 5]. That costs one more pass of the student's backbone
    over the step's batches and one of both heads over the chosen positions, without gradient.
    """

    looks_back = True

    def __init__(
        self, fraction: float | Schedule = 0.2, whole_steps: bool = False, alpha: float = 1.0, ridge: float = 1.0
    ) -> None:
        super().__init__(fraction, whole_steps)
        self.alpha = alpha
        self.A = ridge * torch.eye(len(FEATURES) + 1, dtype=torch.float64)
        self.b = torch.zeros(len(FEATURES) + 1, dtype=torch.float64)
        self._features: list[Tensor] = []
        self.observed: list[tuple[Batch, Bool[Tensor, " N"], TeacherState]] = []

    def __call__(
        self, scores: Float[Tensor, "B T 5"], valid: Valid, step: int = 0, generator: Generators = None
    ) -> Weights:
        place = (valid.cumsum(1) - 1) / valid.sum(1, keepdim=True).clamp(min=1)
        x = torch.cat([scores.double(), place[..., None].double()], dim=-1)
        inverse = self.A.inverse().to(x.device)
        theta = inverse @ self.b.to(x.device)
        bonus = torch.einsum("...i,ij,...j->...", x, inverse, x).clamp(min=0).sqrt()
        weights = top_k((x @ theta + self.alpha * bonus).to(scores.dtype), valid, self.fraction.value(step))
        self._features.append(x[weights > 0].cpu())
        return weights

    def observe(self, batch: Batch, chosen: Bool[Tensor, " N"], teacher_state: TeacherState) -> None:
        self.observed.append((batch, chosen, teacher_state))

    def end_step(self, step: FinishedStep) -> None:
        """Learn from the KL of the chosen positions after the step."""
        update = torch.zeros(len(self.b), len(self.b) + 1, dtype=torch.float64)
        for x, part in zip(self._features, self.observed, strict=True):
            kl_after = step.kl_after(*part)
            reward = (x[:, FEATURES.index("kl")] - kl_after.double().cpu()).clamp(-5, 5)
            update += x.T @ torch.cat([x, reward[:, None]], dim=1)
        update = step.reduce(update)
        self.A, self.b = self.A + update[:, :-1], self.b + update[:, -1]
        self._features, self.observed = [], []

    def state_dict(self) -> dict[str, Tensor]:
        return {"A": self.A, "b": self.b}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.A, self.b = state["A"], state["b"]
