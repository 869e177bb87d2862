"""Which rollout engine, with which student: the one place where a configuration becomes an engine."""

import os
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rollouts import HFEngine, RolloutEngine, VLLMEngine, VLLMServerEngine
from sekd.config import SEKDConfig
from sekd.models import causal_lm, unwrap

MOST = 0.1
"""Mean difference of log-probabilities: bf16 rounds by hundredths, and another model is off by far more."""


def make_engine(model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> RolloutEngine:
    """The engine that ``args`` name, for ``model``, whose weights it gets before each round.

    Every process of a run must call it.
    """
    lm = causal_lm(model)
    own_stops = lm.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(own_stops if isinstance(own_stops, list) else [own_stops])}
    sampling = dict(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        max_completion_length=args.max_completion_length,
        stop_token_ids=sorted(stops - {None}),
        seed=args.seed + 1_000_000 * args.process_index,
    )
    if args.rollout_engine == "hf":
        return HFEngine(unwrap(model), **sampling)
    if args.rollout_engine == "vllm_server":
        return VLLMServerEngine(
            args.rollout_server_urls,
            **sampling,
            weights_folder=os.path.join(str(args.output_dir), "rollout_weights"),
            max_prompt_length=args.max_prompt_length,
            dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            timeout=args.rollout_timeout,
            request_timeout=args.rollout_timeout,
        )
    # The weights arrive before each round, so vLLM needs the architecture only.
    folder = os.path.join(str(args.output_dir), "rollout_config")
    with args.main_process_first(desc="writing the rollout engine's config"):
        if args.process_index == 0:
            lm.config.architectures = [type(lm).__name__]  # a model that was never saved does not say
            lm.config.save_pretrained(folder)
    return VLLMEngine(
        folder,
        **sampling,
        load_format="dummy",
        max_prompt_length=args.max_prompt_length,
        dtype="bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        kv_cache_gib=args.vllm_kv_cache_gib,
    )


@torch.no_grad()
def check_served(engine: VLLMServerEngine, model: nn.Module, prompts: Sequence[list[int]]) -> None:
    """Compare a server's log-probabilities of some tokens with the student's own, once it has its weights.

    Raises:
        ValueError: they differ, so it serves another model.
    """
    student, ids = unwrap(model), max(prompts, key=len)[:64]
    was_training, device = student.training, next(student.parameters()).device
    student.eval()
    logits = student(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
    student.train(was_training)
    own = logits.float().log_softmax(-1)[:-1].cpu().gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    for url in engine.urls:
        difference = float((torch.tensor(engine.logprobs(ids, url)) - own).abs().mean()) if len(ids) > 1 else 0.0
        if not difference < MOST:
            raise ValueError(
                f"rollout server {url} computes other probabilities than the student (log-probabilities differ by "
                f"{difference:.2g} in the mean), so it serves another model; start it with model_name_or_path"
            )
