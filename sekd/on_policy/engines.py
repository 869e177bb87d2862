"""Starting the rollout engine, sending it the student's weights, and checking that it uses them."""

import itertools
from collections.abc import Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rollouts import (
    ENGINES,
    BaseEngine,
    EngineSetup,
    RolloutConfigError,
    RolloutEngine,
    Sampling,
    get_logprobs,
    get_trait,
)
from sekd.config import SEKDConfig
from sekd.models import causal_lm, compute_dtype, unwrap
from sekd.on_policy.weights import base_weights, extract_adapter, full_weights

MAX_LOGPROB_DIFFERENCE = 0.1
"""Largest mean difference of log-probabilities: rounding to bf16 makes about 0.01, and another model much more."""


def make_engine(model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> BaseEngine:
    """Start the engine ``args.rollout_engine`` for the student. Call :func:`send_weights` before its first round.

    Every process that has an engine must call this.
    """
    lm = causal_lm(model)
    setup = EngineSetup(
        model=lm,
        tokenizer=tokenizer,
        sampling=make_sampling(lm, tokenizer, args),
        output_dir=str(args.output_dir),
        max_prompt_length=args.max_prompt_length,
        dtype=compute_dtype(args),
        get_adapter=partial(extract_adapter, model),
        get_base_weights=partial(base_weights, model),
        options=MappingProxyType(vars(args)),
    )
    return ENGINES[args.rollout_engine].start(setup)


def make_sampling(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> Sampling:
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
    )


def send_weights(engine: RolloutEngine | None, model: nn.Module, step: int, max_lora_rank: int = 0) -> None:
    """Send the student's weights to the engine. The student's own weights never change.

    An engine that samples from the student itself needs nothing. An engine that has the base weights gets the adapter
    alone, up to rank ``max_lora_rank``. Otherwise whole weights are sent, with adapters merged into copies.

    Every process must call this, also without an engine: it helps to gather the weights.
    """
    if engine is not None and get_trait(engine, "model") is causal_lm(model):
        engine.sync_weights(causal_lm(model), step)
        return
    adapter = extract_adapter(model) if max_lora_rank else None
    if adapter is not None and adapter.rank > max_lora_rank:
        adapter = None
    weights = full_weights(model) if adapter is None else ()
    if engine is not None:
        engine.sync_weights(adapter or weights, step)
    else:
        for _ in weights:
            pass


@torch.no_grad()
def check_served(
    engine: RolloutEngine | None, model: nn.Module, prompts: Sequence[list[int]], is_shared: bool = False
) -> None:
    """Compare the engine's log-probabilities of some tokens with the student's, after the first sync.

    If several processes share the engine (``is_shared``), every process must call this: it helps with the student's
    forward pass.

    Raises:
        RolloutConfigError: they differ, so the engine samples from another model.
    """
    ids = [*itertools.chain(*prompts)][:64]
    if len(ids) < 2:
        return
    served = {} if engine is None else get_logprobs(engine, ids)
    if not served and not is_shared:
        return
    student = unwrap(model)
    was_training, device = student.training, next(student.parameters()).device
    student.eval()
    logits = student(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
    student.train(was_training)
    expected = logits.float().log_softmax(-1)[:-1].cpu().gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    for name, logprobs in served.items():
        difference = float((torch.tensor(logprobs) - expected).abs().mean())
        if not difference < MAX_LOGPROB_DIFFERENCE:
            raise RolloutConfigError(
                f"rollout server {name} computes other probabilities than the student (log-probabilities differ by "
                f"{difference:.2g} on average), so it serves another model; start it with model_name_or_path"
            )
