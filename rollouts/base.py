"""The interface of an engine: how it starts, how it samples, and the rollouts that it returns."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter without its base model: the content of ``adapter_config.json``, and weights under PEFT's names."""

    config: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max([self.config["r"], *self.config.get("rank_pattern", {}).values()])

    def save(self, folder: str) -> None:
        """Write the files that PEFT writes, so that vLLM can load them."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "adapter_config.json"), "w") as file:
            json.dump(self.config, file)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.weights.items()}
        save_file(weights, os.path.join(folder, "adapter_model.safetensors"))


Weights = nn.Module | Iterable[tuple[str, Tensor]] | Adapter
"""A model, its weights under their checkpoint names, or its adapter alone for an engine that has the base weights."""


class RolloutError(RuntimeError):
    """No rollouts arrived in time."""


class RolloutConfigError(ValueError):
    """An engine or server cannot serve this run. The message says how to fix it."""


@dataclass(frozen=True)
class Sampling:
    """How every engine draws tokens.

    ``temperature`` 0 is greedy. ``top_p``, ``top_k`` (0 is all) and ``min_p`` truncate the distribution.
    ``repetition_penalty`` applies to tokens that are already in the prompt or the completion. A completion ends with a
    token of ``stop_token_ids``, with the token that completes a string of ``stop``, or after ``max_completion_length``
    tokens. ``top_logprobs`` K > 0 asks for the K largest log-probabilities at each position, as the model computes
    them: before temperature, penalty and truncation. ``seed`` makes sampling repeatable; None leaves it to the engine.
    Token ids from ``classes`` on are never drawn; None allows all.

    The order is vLLM's: forbidden classes, penalty, temperature, ``min_p``, ``top_k``, ``top_p``. Each truncation sees
    what the one before it left.
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
    classes: int | None = None

    @property
    def is_unchanged(self) -> bool:
        """Whether tokens are drawn from the model's own distribution: neither sharpened nor truncated nor penalised."""
        neutral = Sampling()
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return all(getattr(self, name) == getattr(neutral, name) for name in names)

    def for_vllm(self) -> dict[str, Any]:
        """The same under vLLM's names, for its ``SamplingParams`` and for requests to its server.

        A server takes every option that a request leaves out from the model's ``generation_config.json``, so the
        penalties that sekd does not have are sent too.
        """
        return dict(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            allowed_token_ids=None if self.classes is None else list(range(self.classes)),
            max_tokens=self.max_completion_length,
            stop_token_ids=list(self.stop_token_ids),
            stop=list(self.stop),
            logprobs=self.top_logprobs or None,
        )


@dataclass(frozen=True, slots=True)
class Rollout:
    """A prompt, its completion, and how it was sampled.

    ``completion_ids`` ends with the stop token if ``finish_reason`` is "stop", and was cut at the length limit if it
    is "length". ``weights_step`` is the optimizer step whose weights sampled it. ``top_logprobs`` [tokens K] float32,
    largest first, belong to the distribution that each token was drawn from. They are None if nobody asked for them.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    weights_step: int
    finish_reason: str
    top_logprobs: np.ndarray | None = field(default=None, compare=False)


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions with the weights that the trainer sends. Any object with these three methods is an engine."""

    def generate(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        """One rollout per prompt, in the same order."""

    def sync_weights(self, model: Weights, step: int) -> None:
        """Sample with these weights from now on; ``step`` is recorded in the rollouts."""

    def close(self) -> None:
        """Free the engine's memory and processes. May be called twice."""


@dataclass(frozen=True)
class EngineSetup:
    """What a run knows when it starts an engine.

    Attributes:
        model: the student's causal language model, without wrappers. An engine must not change it.
        output_dir: the folder of the run.
        max_prompt_length: tokens of the longest prompt.
        dtype: the student's compute dtype.
        get_adapter: the student's LoRA adapter, or None if an engine could not apply it.
        get_base_weights: the weights that the adapter was trained on, under their checkpoint names.
        options: the settings of the run by field name, such as ``rollout_timeout``.
        evaluation_context: tokens of the longest prompt with its completion in :meth:`BaseEngine.generate_with`; 0 if
            the run does not call it.

    ``get_adapter`` and ``get_base_weights`` gather shards, so only an engine that every process starts may call them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    output_dir: str
    max_prompt_length: int
    dtype: torch.dtype
    get_adapter: Callable[[], Adapter | None]
    get_base_weights: Callable[[], Iterable[tuple[str, Tensor]]]
    options: Mapping[str, Any]
    evaluation_context: int = 0


class BaseEngine(RolloutEngine):
    """An engine that can be started by its name in :data:`rollouts.ENGINES`.

    The attributes and the last method say how a run may use the engine. Their defaults suit an engine that has only the
    three methods of :class:`RolloutEngine`. The first eight are read from the class, before an engine is started.

    Attributes:
        requires: the package that must be installed.
        single_process: works only in a run of one process.
        per_process: every process of the run has an engine. Otherwise the main process has one for all.
        uses_servers: connects to ``rollout_server_urls``; ``rollout_transfer`` says how weights reach them.
        generates_in_background: can generate while the student trains (``rollout_staleness``).
        shares_model: samples from the student itself, so it needs no weights and takes quantized students too.
        takes_sampling: has :meth:`generate_with`. Otherwise transformers generates for evaluations in training.
        remedy: what to do if it computes other probabilities than the student; the end of an error message.
        model: the module that it samples from, if that is in this process.
        lora_rank: the largest rank of LoRA adapters that it takes alone; 0 if it takes whole weights.
    """

    requires: str | None = None
    single_process: bool = False
    per_process: bool = False
    uses_servers: bool = False
    generates_in_background: bool = False
    shares_model: bool = False
    takes_sampling: bool = False
    remedy: str = "use another rollout_engine"
    model: Any = None
    lora_rank: int = 0

    @classmethod
    def start(cls, setup: EngineSetup) -> "BaseEngine":
        """Start the engine of a run. Each process that has an engine calls this once, before the first round.

        Raises:
            RolloutConfigError: the engine does not define it.
        """
        raise RolloutConfigError(f"{cls.__name__} has no start(setup), so it cannot be started by its name; define it")

    def generate_with(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Rollout]:
        """One rollout per prompt, in the same order, sampled in another way than the run's own.

        The engine's own options and its count of rounds stay as they are, so the next :meth:`generate` is the same with
        and without this call. The seeds depend on ``sampling.seed`` and on the place of a prompt alone.

        Raises:
            RolloutConfigError: the engine does not define it (``takes_sampling`` is False).
        """
        raise RolloutConfigError(f"{type(self).__name__} samples in one way only: it does not define generate_with")

    def logprobs(self, token_ids: list[int]) -> dict[str, list[float]]:
        """The log-probability of each token but the first, by the name of each server or replica.

        The run compares them with the student's after weight syncs. A server that does not answer is left out, and an
        engine without log-probabilities returns nothing.
        """
        return {}


def get_trait(engine: "RolloutEngine | type[BaseEngine]", name: str) -> Any:
    """An attribute of an engine or its class, or the default of :class:`BaseEngine`."""
    return getattr(engine, name) if hasattr(engine, name) else getattr(BaseEngine, name)


def get_logprobs(engine: "RolloutEngine", token_ids: list[int]) -> dict[str, list[float]]:
    """:meth:`BaseEngine.logprobs`; nothing from an engine without this method."""
    return engine.logprobs(token_ids) if isinstance(engine, BaseEngine) else {}


def named_weights(model: Weights) -> Iterator[tuple[str, Tensor]]:
    """Weights with their checkpoint names.

    Raises:
        ValueError: an adapter, or a model with adapters: no checkpoint has their names.
    """
    if isinstance(model, Adapter):
        raise ValueError("this engine does not take an adapter alone; pass merged weights under their checkpoint names")
    if not isinstance(model, nn.Module):
        yield from model
        return
    for name, tensor in model.state_dict().items():
        if ".lora_" in name or ".base_layer." in name:
            raise ValueError(f"weight {name!r} belongs to an adapter; pass merged weights under their checkpoint names")
        yield name, tensor.detach()


def request_seeds(seed: int | None, step: int, round_: int, count: int) -> list[int | None]:
    """A seed for each prompt of a round. It does not depend on how the engine batches, and differs in every round."""
    if seed is None:
        return [None] * count
    # 2**31 - 1 is prime, so these multipliers spread neighbouring steps and rounds over all seeds.
    base = seed * 1_000_003 + step * 7_368_787 + round_ * 15_485_863
    return [(base + i * 104_729) % (2**31 - 1) for i in range(count)]


def separate_seeds(sampling: Sampling, count: int) -> list[int | None]:
    """A seed for each prompt of :meth:`BaseEngine.generate_with`: the same at every call, and used by no step."""
    return request_seeds(sampling.seed, -1, 0, count)
