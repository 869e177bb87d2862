"""Starting the rollout engine and sending it the student's weights, with the trainer's random generators kept."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rollouts import (
    ENGINES,
    BaseEngine,
    EngineSetup,
    HFEngine,
    Rollout,
    RolloutEngine,
    Sampling,
    get_trait,
)
from sekd.config import SEKDConfig
from sekd.models import causal_lm, compute_dtype, count_classes
from sekd.on_policy.weights import base_weights, extract_adapter, full_weights

Generate = Callable[[list[list[int]], Sampling], list[Rollout]]
"""Gives one rollout for each prompt, in the same order."""


def make_engine(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: SEKDConfig,
    classes: int | None = None,
    evaluation_context: int = 0,
) -> BaseEngine:
    """Start the engine ``args.rollout_engine`` for the student. Call :func:`send_weights` before its first round.

    No token id from ``classes`` on is drawn, since the teacher has no such class. ``evaluation_context`` is the number
    of tokens that :meth:`BaseEngine.generate_with` will read and generate at most; 0 if nothing calls it.

    Every process that has an engine must call this.
    """
    lm = causal_lm(model)
    setup = EngineSetup(
        model=lm,
        tokenizer=tokenizer,
        sampling=make_sampling(lm, tokenizer, args, classes),
        output_dir=str(args.output_dir),
        max_prompt_length=args.max_prompt_length,
        dtype=compute_dtype(args),
        get_adapter=partial(extract_adapter, model),
        get_base_weights=partial(base_weights, model),
        options=MappingProxyType(vars(args)),
        evaluation_context=evaluation_context,
    )
    return ENGINES[args.rollout_engine].start(setup)


def make_sampling(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: SEKDConfig, classes: int | None = None
) -> Sampling:
    """The sampling options of ``args``. Completions end with a stop token of the model or the tokenizer."""
    eos: Any = lm.generation_config.eos_token_id
    stop_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    return Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        max_completion_length=args.max_completion_length,
        stop_token_ids=sorted(stop_ids - {None}),
        stop=args.stop_strings,
        top_logprobs=args.score_logprobs if args.score_source == "rollout" else 0,
        seed=args.seed + 1_000_000 * args.process_index,
        classes=classes if classes is not None and classes < count_classes(lm) else None,
    )


def send_weights(engine: RolloutEngine | None, model: nn.Module, step: int, max_lora_rank: int = 0) -> None:
    """Send the student's weights to the engine. The student's own weights never change.

    An engine that samples from the student itself needs nothing. An engine that has the base weights gets the adapter
    alone, up to rank ``max_lora_rank``. Otherwise whole weights are sent, with adapters merged into copies.

    Every process must call this, also without an engine: it helps to gather the weights.
    """
    if engine is not None and samples_from(engine, model):
        engine.sync_weights(causal_lm(model), step)
        return
    adapter = extract_adapter(model) if max_lora_rank else None
    if adapter is not None and adapter.rank > max_lora_rank:
        adapter = None
    weights = full_weights(model) if adapter is None else ()
    try:
        if engine is not None:
            engine.sync_weights(adapter or weights, step)
    finally:  # also if the engine refuses them: the other processes gather all of them
        for _ in weights:
            pass


def samples_from(engine: RolloutEngine | None, model: nn.Module) -> bool:
    """Whether the engine samples from the student itself, and not from a copy of its weights."""
    return engine is not None and get_trait(engine, "model") is causal_lm(model)


def generate_inside(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, batch_size: int
) -> Generate:
    """A function that generates with the student itself through transformers, for evaluations without an engine."""

    def generate(prompts: list[list[int]], sampling: Sampling) -> list[Rollout]:
        engine = HFEngine(causal_lm(model), tokenizer=tokenizer, batch_size=batch_size)
        with keep_generators("evaluation"), accelerator.autocast():
            return engine.generate_with(prompts, sampling)

    return generate


@contextmanager
def keep_generators(name: str) -> Iterator[None]:
    """Keep the trainer's random generators as they are, whatever an engine does in the block.

    vLLM seeds and draws from them, so the trainer's own draws (dropout) would depend on when an engine starts and how
    often it generates, and a resumed run would differ. In the block the generators are seeded by ``name``, so that an
    engine that draws from them draws the same in a resumed run, and other numbers in the next round.
    """
    has_gpu = torch.cuda.is_available()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu_states = torch.cuda.get_rng_state_all() if has_gpu else []
    seed = random.Random(name).getrandbits(32)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # the GPUs' generators too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if has_gpu:
            torch.cuda.set_rng_state_all(gpu_states)
