"""vLLM in this process, on a CPU or a GPU."""

import copy
import glob
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from transformers.utils import logging

from rollouts.base import (
    Adapter,
    BaseEngine,
    EngineSetup,
    Rollout,
    RolloutConfigError,
    Sampling,
    Weights,
    named_weights,
    request_seeds,
    separate_seeds,
)
from rollouts.vllm_setup import set_up_vllm

logger = logging.get_logger(__name__)

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM allows for its ``max_lora_rank``."""


class VLLMEngine(BaseEngine):
    """vLLM inside the trainer's process. Weights are sent in memory, and everything ends with the process.

    Args:
        model: a folder or hub id. Until the first :meth:`sync_weights`, its own weights are used (step 0).
        max_prompt_length, max_completion_length: in tokens; their sum is vLLM's context length.
        load_format: "dummy" does not read weights: ``model`` may be a folder with a configuration only. Sync before the
            first round.
        lora_rank: the rank of the adapters that :meth:`sync_weights` will send, trained on the weights of ``model``; 0
            for whole weights.
        gpu_memory_utilization: the fraction of the GPU's memory that vLLM may use.
        kv_cache_gib: memory for the key-value cache on a CPU.
        enforce_eager: neither compile the model nor capture CUDA graphs. It starts at once, but generates more slowly.
        sleep: free GPU memory for the trainer between a round and the next sync. It has no effect on a CPU.
        evaluation_context: tokens of the longest prompt with its completion in :meth:`generate_with`, if that is more
            than the context length. vLLM then starts with the tokenizer in ``model``, so that it takes stop strings.
        sampling: the other fields of :class:`rollouts.base.Sampling`. The model's own stop tokens end a completion too.

    Raises:
        ImportError: vLLM is not installed.
        RolloutConfigError: vLLM cannot start with these options or apply the adapter, or gets whole weights where it
            expects adapters.

    Starting it and :meth:`generate` draw from the generators of the process. A trainer that needs its own draws keeps
    their states (:func:`sekd.on_policy.engines.keep_generators`).
    """

    requires = "vllm"
    single_process = True
    takes_sampling = True
    remedy = (
        "vLLM does not take this student's weights as they are (mixtures of experts on a CPU, for example); use "
        "rollout_engine: hf"
    )

    @classmethod
    def start(cls, setup: EngineSetup) -> "VLLMEngine":
        """Start vLLM on the student's base weights if it can apply the student's adapter, else on its architecture."""
        adapter = setup.get_adapter()
        if adapter is not None and adapter.rank <= LORA_RANKS[-1]:
            try:
                return cls._start(setup, adapter.rank)
            except ValueError as error:
                if "does not support LoRA" not in str(error):
                    raise
                logger.warning(f"vLLM does not support LoRA for {type(setup.model).__name__}: sending merged weights")
        return cls._start(setup, lora_rank=0)

    @classmethod
    def _start(cls, setup: EngineSetup, lora_rank: int) -> "VLLMEngine":
        """Start vLLM from a folder with the student's configuration, and with its base weights if adapters follow."""
        folder, options = os.path.join(setup.output_dir, "rollout_config"), setup.options
        config = copy.deepcopy(setup.model.config)
        config.architectures = [type(setup.model).__name__]  # a model that was never saved has none here
        config.save_pretrained(folder)
        if setup.sampling.stop or setup.evaluation_context:
            setup.tokenizer.save_pretrained(folder)
        if lora_rank:
            save_torch_state_dict({name: w.to("cpu", setup.dtype) for name, w in setup.get_base_weights()}, folder)
        try:
            return cls(
                folder,
                **asdict(setup.sampling),
                load_format="auto" if lora_rank else "dummy",
                lora_rank=lora_rank,
                max_prompt_length=setup.max_prompt_length,
                dtype=str(setup.dtype).removeprefix("torch."),
                gpu_memory_utilization=options["vllm_gpu_memory_utilization"],
                kv_cache_gib=options["vllm_kv_cache_gib"],
                enforce_eager=options["vllm_enforce_eager"],
                sleep=options["vllm_sleep"],
                evaluation_context=setup.evaluation_context,
            )
        finally:  # vLLM has read the weights
            for path in glob.glob(os.path.join(glob.escape(folder), "*.safetensors*")):
                os.remove(path)

    def __init__(
        self,
        model: str,
        temperature: float = 1.0,
        max_completion_length: int = 256,
        *,
        max_prompt_length: int = 512,
        dtype: str = "auto",
        load_format: str = "auto",
        lora_rank: int = 0,
        gpu_memory_utilization: float = 0.3,
        kv_cache_gib: float = 1.0,
        enforce_eager: bool = False,
        sleep: bool = False,
        evaluation_context: int = 0,
        **sampling: Any,
    ) -> None:
        self.sampling = drawing = Sampling(temperature, max_completion_length, **sampling)
        settings = set_up_vllm(kv_cache_gib, enforce_eager)
        from vllm import LLM
        from vllm.platforms import current_platform

        context, options = max(max_prompt_length + max_completion_length, evaluation_context), dict[str, Any]()
        if not torch.cuda.is_available() and drawing.seed is not None:
            # If vLLM splits a prompt, it rewinds the request's generator, which is possible on GPUs only.
            options = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, context)}
        self.lora_rank = next((r for r in LORA_RANKS if r >= lora_rank), lora_rank) if lora_rank else 0
        if lora_rank:
            options |= {"enable_lora": True, "max_lora_rank": self.lora_rank, "max_loras": 1}
        self.sleeps = sleep and current_platform.is_sleep_mode_available()
        try:
            self.llm: Any = LLM(
                model,
                dtype=dtype,
                load_format=load_format,
                max_model_len=context,
                max_logprobs=max(20, drawing.top_logprobs),
                skip_tokenizer_init=not (drawing.stop or evaluation_context),  # only stop strings need it
                gpu_memory_utilization=gpu_memory_utilization,
                enable_sleep_mode=self.sleeps,
                seed=drawing.seed or 0,
                **settings,
                **options,
            )
        except ValueError as error:  # options that do not suit the model
            raise RolloutConfigError(f"vLLM cannot start: {' '.join(str(error).split())}") from error
        self.step, self.round = 0, 0
        self.asleep = False
        self.lora, self.lora_count = None, 0

    def generate(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        seeds = request_seeds(self.sampling.seed, self.step, self.round, len(prompts))
        self.round += 1
        return self._generate(prompts, self.sampling, seeds)

    def generate_with(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Rollout]:
        return self._generate(prompts, sampling, separate_seeds(sampling, len(prompts)))

    def _generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int | None]) -> list[Rollout]:
        from vllm import SamplingParams

        self._wake()
        options = sampling.for_vllm() | {"detokenize": bool(sampling.stop), "flat_logprobs": True}
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [SamplingParams(**options, seed=seed) for seed in seeds],
            lora_request=self.lora,
            use_tqdm=False,
        )
        if self.sleeps:
            self.llm.sleep(level=1)
            self.asleep = True
        return [
            Rollout(ids, list(out.token_ids), self.step, out.finish_reason, _read_top(out.logprobs, sampling))
            for ids, out in zip(prompts, (request.outputs[0] for request in outputs), strict=True)
        ]

    def logprobs(self, token_ids: list[int]) -> dict[str, list[float]]:
        from vllm import SamplingParams

        self._wake()
        (output,) = self.llm.generate(
            [{"prompt_token_ids": token_ids}],
            [SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)],
            lora_request=self.lora,
            use_tqdm=False,
        )
        entries = zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)
        return {"vLLM in this process": [entry[token].logprob for token, entry in entries]}

    def sync_weights(self, model: Weights, step: int) -> None:
        self._wake()
        if isinstance(model, Adapter):
            self._send_adapter(model)
        elif self.lora_rank:
            raise RolloutConfigError("this engine was started with lora_rank and takes adapters only")
        else:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_weights(model)})
        self.llm.reset_prefix_cache()
        self.step, self.round = step, 0

    def _send_adapter(self, adapter: Adapter) -> None:
        """Load the adapter under a new id: vLLM does not load an id that it already has."""
        from vllm.lora.request import LoRARequest

        old, self.lora_count = self.lora, self.lora_count + 1
        folder = tempfile.mkdtemp(prefix="sekd-adapter-")
        try:
            adapter.save(folder)
            new = LoRARequest(f"adapter-{self.lora_count}", self.lora_count, folder)
            if old is not None:
                self.llm.llm_engine.remove_lora(old.lora_int_id)
            self.llm.llm_engine.add_lora(new)  # reads the files at once
        except (ValueError, RuntimeError) as error:
            raise RolloutConfigError(
                f"vLLM cannot apply this LoRA adapter ({error}); choose other lora_target_modules"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.lora = new

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def close(self) -> None:
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None


def _read_top(flat: Any, sampling: Sampling) -> np.ndarray | None:
    """At each position, vLLM lists the sampled token first and then the likeliest tokens."""
    return np.array(flat.logprobs, np.float32).reshape(len(flat), -1)[:, 1:] if sampling.top_logprobs else None
