"""The base class of policies, and FinishedStep, from which a policy learns after an optimizer step."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sekd.policies.ranks import Generators, Valid, Weights
from sekd.schedules import Schedule, make_schedule
from sekd.types import Batch, TeacherState


def _no_student(*_: Any) -> Tensor:
    raise ValueError(
        "this policy learns from the student after a step; give FinishedStep its kl_after (SEKDTrainer does so)"
    )


@dataclass(frozen=True)
class FinishedStep:
    """What a policy may ask when an optimizer step has ended.

    ``gather`` joins the lists of all processes. ``reduce`` sums a tensor over processes. ``kl_after(batch, chosen,
    teacher_state)`` is KL(p || q) [K] of the K chosen positions of a batch, with the student after the step.
    """

    gather: Callable[[list], list] = list
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    kl_after: Callable[[Batch, Bool[Tensor, " N"], TeacherState], Float[Tensor, " K"]] = _no_student


class PositionPolicy(ABC):
    """Maps scores [B T] to weights [B T]; positions of weight 0 are not distilled. Every hook does nothing by default.

    State is frozen during an optimizer step: every micro-batch on every process sees the same state. :meth:`end_step`
    updates it. With ``whole_steps`` the caller calls it. Without, ``gls`` takes each call for a step of its own.

    ``fraction.value(step)`` is the fraction of the positions to choose at a step.
    """

    has_state: ClassVar[bool] = True
    """Whether it learns from steps: its state is in checkpoints."""

    mean_over: ClassVar[str] = "sequence"
    """What the loss is a mean over: the chosen positions of a ``sequence``, or those of the whole ``step``."""

    looks_back: ClassVar[bool] = False
    """Whether it computes the divergence of the chosen positions again, after the step."""

    selected: int | None = None
    """Number of positions chosen so far in this step, or None.

    With a number, the trainer multiplies the step's gradient by sequences / ``selected``.
    """

    def __init__(self, fraction: float | Schedule = 0.2, whole_steps: bool = False) -> None:
        self.fraction, self.whole_steps = make_schedule("position_fraction", fraction), whole_steps

    @abstractmethod
    def __call__(self, scores: Tensor, valid: Valid, step: int = 0, generator: Generators = None) -> Weights:
        """Weights of the positions."""

    def observe(self, batch: Batch, chosen: Bool[Tensor, " N"], teacher_state: TeacherState) -> None:  # noqa: B027
        """Called after each micro-batch.

        ``chosen`` marks positions among its N valid ones. ``teacher_state`` holds only the chosen ones.
        """

    def end_step(self, step: FinishedStep) -> None:  # noqa: B027
        """Learn from the optimizer step that has ended."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep; empty for a policy without state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Resume from :meth:`state_dict`."""


class Stateless(PositionPolicy):
    """A policy that is a function of the scores alone."""

    has_state: ClassVar[bool] = False

    def __init__(self, function: Callable[..., Weights], fraction: float | Schedule, **options: Any) -> None:
        super().__init__(fraction)
        self.function = partial(function, **options)

    def __call__(self, scores: Tensor, valid: Valid, step: int = 0, generator: Generators = None) -> Weights:
        return self.function(scores, valid, fraction=self.fraction.value(step), step=step, generator=generator)


STATE_FILE = "position_policy.pt"


def save_state(policy: PositionPolicy, name: str, folder: str) -> None:
    """Write the state of the policy ``name``, if it has one, into a checkpoint folder. Make the folder if needed."""
    if policy.has_state:
        os.makedirs(folder, exist_ok=True)
        torch.save({name: policy.state_dict()}, os.path.join(folder, STATE_FILE))


def load_state(policy: PositionPolicy, name: str, folder: str) -> None:
    """Load the state of the policy ``name``, if it has one, from a checkpoint folder.

    Raises:
        ValueError: the checkpoint has no state, or the state of another policy.
    """
    if not policy.has_state:
        return
    path = os.path.join(folder, STATE_FILE)
    states = torch.load(path, weights_only=True) if os.path.exists(path) else {}
    if name not in states:
        raise ValueError(
            f"checkpoint {folder!r} has no state of position_policy {name!r}: it was made with "
            f"{', '.join(states) or 'another policy'}; resume with that policy, or start again without the checkpoint"
        )
    policy.load_state_dict(states[name])
