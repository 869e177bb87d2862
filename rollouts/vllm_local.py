"""vLLM in this process, on a CPU or a GPU."""

import os
import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rollouts.base import Rollout, Weights, named_weights, request_seeds


class VLLMEngine:
    """vLLM inside the trainer's process: weights are handed over in memory, and nothing outlives the process.

    Args:
        model: a folder or hub id. Weights arrive later by :meth:`sync_weights`; until then its own are used (step 0).
        max_prompt_length, max_completion_length: tokens; their sum is vLLM's context.
        stop_token_ids: tokens that end a completion, beside the model's own.
        load_format: "dummy" reads no weights: the folder may hold the configuration alone, if a sync follows.
        seed: makes sampling repeatable; None leaves it to vLLM.
        gpu_memory_utilization, kv_cache_gib: what vLLM may take of a GPU, or of the memory on a CPU.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        temperature: float = 1.0,
        max_completion_length: int = 256,
        *,
        max_prompt_length: int = 512,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop_token_ids: Sequence[int] = (),
        seed: int | None = 0,
        dtype: str = "auto",
        load_format: str = "auto",
        gpu_memory_utilization: float = 0.3,
        kv_cache_gib: float = 1.0,
    ) -> None:
        # Without these vLLM would start a second process, and pin this one's threads to single cores.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(kv_cache_gib)))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about vLLM's own code
            from vllm import LLM

        context, options = max_prompt_length + max_completion_length, {}
        if seed is not None and not torch.cuda.is_available():
            # Where vLLM cuts a prompt in two it rewinds the request's generator, which only a GPU's can.
            options = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, context)}
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.llm: Any = LLM(
            model,
            dtype=dtype,
            load_format=load_format,
            max_model_len=context,
            enforce_eager=True,
            distributed_executor_backend="uni",
            skip_tokenizer_init=True,
            gpu_memory_utilization=gpu_memory_utilization,
            seed=seed or 0,
            disable_log_stats=True,
            **options,
        )
        # vLLM seeds every generator of the process; the trainer's draws must not depend on when an engine starts.
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        self.sampling = dict(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            max_tokens=max_completion_length,
            stop_token_ids=list(stop_token_ids),
            detokenize=False,
        )
        self.seed, self.step, self.round = seed, 0, 0

    def generate(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        from vllm import SamplingParams

        seeds = request_seeds(self.seed, self.step, self.round, len(prompts))
        self.round += 1
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [SamplingParams(**self.sampling, seed=seed) for seed in seeds],
            use_tqdm=False,
        )
        return [
            Rollout(ids, list(out.outputs[0].token_ids), self.step, out.outputs[0].finish_reason)
            for ids, out in zip(prompts, outputs, strict=True)
        ]

    def sync_weights(self, model: Weights, step: int) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_weights(model)})
        self.llm.reset_prefix_cache()
        self.step, self.round = step, 0

    def close(self) -> None:
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
