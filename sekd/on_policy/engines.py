"""Which rollout engine, with which student: the one place where a configuration becomes an engine."""

import glob
import itertools
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from rollouts import HFEngine, RolloutConfigError, RolloutEngine, VLLMEngine, VLLMServerEngine
from rollouts.vllm_local import LORA_RANKS
from sekd.config import SEKDConfig
from sekd.models import causal_lm, unwrap
from sekd.on_policy.weights import base_weights, extract_adapter, full_weights

logger = logging.get_logger(__name__)

MAX_LOGPROB_DIFFERENCE = 0.1
"""Mean difference of log-probabilities: bf16 rounds by hundredths, and another model is off by far more."""


def make_engine(model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> RolloutEngine:
    """The engine that ``args`` name, for ``model``, whose weights it gets before each round (:func:`sync`).

    Every process that has an engine of its own must call it.
    """
    lm = causal_lm(model)
    own_stops = lm.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(own_stops if isinstance(own_stops, list) else [own_stops])}
    sampling = dict(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        max_completion_length=args.max_completion_length,
        stop_token_ids=sorted(stops - {None}),
        stop=args.stop_strings,
        top_logprobs=args.score_logprobs if args.score_source == "rollout" else 0,
        seed=args.seed + 1_000_000 * args.process_index,
    )
    dtype = _dtype(args)
    if args.rollout_engine == "hf":
        return HFEngine(lm, **sampling, tokenizer=tokenizer)
    if args.rollout_engine == "vllm_server":
        shutil.rmtree(os.path.join(str(args.output_dir), "rollout_weights"), ignore_errors=True)  # of a killed run
        return VLLMServerEngine(
            args.rollout_server_urls,
            **sampling,
            weights_folder=os.path.join(str(args.output_dir), "rollout_weights"),
            max_prompt_length=args.max_prompt_length,
            dtype=None if dtype == torch.float32 else dtype,
            transfer=args.rollout_transfer,
            timeout=args.rollout_timeout,
            request_timeout=args.rollout_timeout,
        )
    adapter = extract_adapter(model)
    if adapter is not None and adapter.rank <= LORA_RANKS[-1]:
        try:
            return _vllm_engine(model, tokenizer, args, sampling, adapter.rank)
        except ValueError as error:
            if "does not support LoRA" not in str(error):
                raise
            logger.warning(f"vLLM has no LoRA for {type(lm).__name__}: merged weights are sent")
    return _vllm_engine(model, tokenizer, args, sampling, 0)


def _vllm_engine(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: SEKDConfig, sampling: dict[str, Any], lora_rank: int
) -> VLLMEngine:
    """vLLM with the student's architecture alone, or for adapters with what is below them."""
    lm, dtype = causal_lm(model), _dtype(args)
    folder = os.path.join(str(args.output_dir), "rollout_config")
    lm.config.architectures = [type(lm).__name__]  # a model that was never saved does not say
    lm.config.save_pretrained(folder)
    if args.stop_strings:
        tokenizer.save_pretrained(folder)
    if lora_rank:
        save_torch_state_dict({name: tensor.to("cpu", dtype) for name, tensor in base_weights(model)}, folder)
    try:
        return VLLMEngine(
            folder,
            **sampling,
            load_format="auto" if lora_rank else "dummy",
            lora_rank=lora_rank,
            max_prompt_length=args.max_prompt_length,
            dtype=str(dtype).removeprefix("torch."),
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            kv_cache_gib=args.vllm_kv_cache_gib,
            enforce_eager=args.vllm_enforce_eager,
            sleep=args.vllm_sleep,
        )
    finally:
        for path in glob.glob(os.path.join(folder, "*.safetensors*")):
            os.remove(path)


def _dtype(args: SEKDConfig) -> torch.dtype:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def sync(engine: RolloutEngine | None, model: nn.Module, step: int, lora_rank: int = 0) -> None:
    """Give an engine the student's weights: its own model is shared, an adapter of up to ``lora_rank`` goes alone to an
    engine that holds what is below it, and all else are whole weights, adapters merged into copies. The student's own
    weights never change.

    A process without an engine takes its part in gathering the weights.
    """
    if engine is not None and getattr(engine, "model", None) is causal_lm(model):
        return engine.sync_weights(causal_lm(model), step)
    adapter = extract_adapter(model) if lora_rank else None
    if adapter is not None and adapter.rank > lora_rank:
        adapter = None
    weights = full_weights(model) if adapter is None else ()
    if engine is not None:
        engine.sync_weights(adapter or weights, step)
    else:
        for _ in weights:
            pass


@torch.no_grad()
def check_served(engine: RolloutEngine | None, model: nn.Module, prompts: Sequence[list[int]]) -> None:
    """Compare a server's log-probabilities of some tokens with the student's own, once it has its weights. A process
    without an engine takes its part in the student's forward.

    Raises:
        RolloutConfigError: they differ, so it serves another model.
    """
    student, ids = unwrap(model), [*itertools.chain(*prompts)][:64]
    was_training, device = student.training, next(student.parameters()).device
    student.eval()
    logits = student(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
    student.train(was_training)
    own = logits.float().log_softmax(-1)[:-1].cpu().gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    if not isinstance(engine, VLLMServerEngine):
        return
    for url in engine.urls:
        difference = float((torch.tensor(engine.logprobs(ids, url)) - own).abs().mean()) if len(ids) > 1 else 0.0
        if not difference < MAX_LOGPROB_DIFFERENCE:
            raise RolloutConfigError(
                f"rollout server {url} computes other probabilities than the student (log-probabilities differ by "
                f"{difference:.2g} in the mean), so it serves another model; start it with model_name_or_path"
            )
