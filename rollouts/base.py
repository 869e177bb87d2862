"""The three verbs of an engine, and what it returns."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

Weights = nn.Module | Iterable[tuple[str, Tensor]]
"""A model, or its weights under their checkpoint names."""


class RolloutError(RuntimeError):
    """No rollout came within the time that was given."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A completion and how it came about.

    ``completion_ids`` ends with the stop token if ``finish_reason`` is "stop", and was cut at the length limit if it
    is "length". ``weights_step`` is the optimizer step whose weights sampled it.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    weights_step: int
    finish_reason: str


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions with weights that the trainer hands over."""

    def generate(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        """One rollout a prompt, in order."""

    def sync_weights(self, model: Weights, step: int) -> None:
        """Sample with these weights from now on; ``step`` is recorded in the rollouts."""

    def close(self) -> None:
        """Free the engine's memory and processes. May be called twice."""


def named_weights(model: Weights) -> Iterator[tuple[str, Tensor]]:
    """The weights of a plain model, or those given.

    Raises:
        ValueError: a model with adapters, whose names no engine knows.
    """
    if not isinstance(model, nn.Module):
        yield from model
        return
    for name, tensor in model.state_dict().items():
        if ".lora_" in name or ".base_layer." in name:
            raise ValueError(f"weight {name!r} belongs to an adapter; pass merged weights under their checkpoint names")
        yield name, tensor.detach()


def request_seeds(seed: int | None, step: int, round_: int, count: int) -> list[int | None]:
    """A seed for each prompt of a round: repeatable whatever else the engine batches, and different every round."""
    if seed is None:
        return [None] * count
    # 2**31 - 1 is prime, so these multipliers spread neighbouring steps and rounds over all seeds.
    base = seed * 1_000_003 + step * 7_368_787 + round_ * 15_485_863
    return [(base + i * 104_729) % (2**31 - 1) for i in range(count)]
