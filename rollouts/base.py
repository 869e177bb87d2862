"""The three verbs of an engine, what it is told of sampling, and what it returns."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter without its base: the content of ``adapter_config.json``, and the weights as PEFT names them."""

    config: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max([self.config["r"], *self.config.get("rank_pattern", {}).values()])

    def save(self, folder: str) -> None:
        """Write it as PEFT does, so that vLLM can load it."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "adapter_config.json"), "w") as file:
            json.dump(self.config, file)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.weights.items()}
        save_file(weights, os.path.join(folder, "adapter_model.safetensors"))


Weights = nn.Module | Iterable[tuple[str, Tensor]] | Adapter
"""A model, or its weights under their checkpoint names, or its adapter alone where the engine has the base."""


class RolloutError(RuntimeError):
    """No rollout came within the time that was given."""


class RolloutConfigError(ValueError):
    """A server or engine that can never serve this run, with the remedy."""


@dataclass(frozen=True)
class Sampling:
    """How every engine draws tokens.

    ``temperature`` 0 is greedy; ``top_p``, ``top_k`` (0 is all) and ``min_p`` cut the distribution off;
    ``repetition_penalty`` is on what prompt and completion hold already. A completion ends with a token of
    ``stop_token_ids``, with the one that completes a string of ``stop``, or after ``max_completion_length`` tokens.
    ``top_logprobs`` K > 0 asks for the K largest log-probabilities at each position, as the model gives them: before
    temperature, penalty and cuts. ``seed`` makes sampling repeatable; None leaves it to the engine.
    """

    temperature: float = 1.0
    max_completion_length: int = 256
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: Sequence[int] = ()
    stop: Sequence[str] = ()
    top_logprobs: int = 0
    seed: int | None = 0

    def for_vllm(self) -> dict[str, Any]:
        """vLLM's names, in a request to its server as in its ``SamplingParams``."""
        return dict(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_tokens=self.max_completion_length,
            stop_token_ids=list(self.stop_token_ids),
            stop=list(self.stop),
            logprobs=self.top_logprobs or None,
        )


@dataclass(frozen=True, slots=True)
class Rollout:
    """A completion and how it came about.

    ``completion_ids`` ends with the stop token if ``finish_reason`` is "stop", and was cut at the length limit if it
    is "length". ``weights_step`` is the optimizer step whose weights sampled it. ``top_logprobs`` [tokens K] float32,
    largest first, are those of the distribution that each token was drawn from, if they were asked for.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    weights_step: int
    finish_reason: str
    top_logprobs: np.ndarray | None = field(default=None, compare=False)


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
        ValueError: an adapter, or a model with adapters, whose names no engine knows.
    """
    if isinstance(model, Adapter):
        raise ValueError("this engine takes no adapter alone; pass merged weights under their checkpoint names")
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
