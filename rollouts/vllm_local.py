"""vLLM in this process, on a CPU or a GPU."""

import os
import random
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rollouts.base import Adapter, Rollout, RolloutConfigError, Sampling, Weights, named_weights, request_seeds

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can be told to keep room for."""


def _can_compile() -> bool:
    """Whether there is what torch compiles for a CPU with: a compiler, and Python's headers."""
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    return shutil.which(os.environ.get("CXX", "g++")) is not None and os.path.exists(header)


class VLLMEngine:
    """vLLM inside the trainer's process: weights are handed over in memory, and nothing outlives the process.

    Args:
        model: a folder or hub id. Weights arrive later by :meth:`sync_weights`; until then its own are used (step 0).
        max_prompt_length, max_completion_length: tokens; their sum is vLLM's context.
        load_format: "dummy" reads no weights: the folder may hold the configuration alone, if a sync follows.
        lora_rank: of the adapters that :meth:`sync_weights` takes, for the weights of ``model``; 0 takes whole weights.
        gpu_memory_utilization, kv_cache_gib: what vLLM may take of a GPU, or of the memory on a CPU.
        enforce_eager: neither compile the model nor capture CUDA graphs: it starts at once, and writes slower.
        sleep: leave the GPU's memory to the trainer between a round and the next sync; a CPU has none to leave.
        sampling: the other fields of :class:`rollouts.base.Sampling`. The model's own stop tokens end a completion too.

    Raises:
        ImportError: vLLM is not installed.
        RolloutConfigError: an adapter that vLLM cannot take, or whole weights where adapters are expected.
    """

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
        **sampling: Any,
    ) -> None:
        self.sampling = how = Sampling(temperature, max_completion_length, **sampling)
        # Without these vLLM would start a second process, and pin this one's threads to single cores.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(kv_cache_gib)))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about vLLM's own code
            from vllm import LLM
            from vllm.platforms import current_platform

        context, options = max_prompt_length + max_completion_length, dict[str, Any]()
        if not torch.cuda.is_available():
            os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")  # what it saves is of no use on a CPU: it does not load
            enforce_eager = enforce_eager or not _can_compile()
            if how.seed is not None:
                # Where vLLM cuts a prompt in two it rewinds the request's generator, which only a GPU's can.
                options = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, context)}
        self.lora_rank = next((r for r in LORA_RANKS if r >= lora_rank), lora_rank) if lora_rank else 0
        if lora_rank:
            options |= {"enable_lora": True, "max_lora_rank": self.lora_rank, "max_loras": 1}
        self.sleeps = sleep and current_platform.is_sleep_mode_available()
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.llm: Any = LLM(
            model,
            dtype=dtype,
            load_format=load_format,
            max_model_len=context,
            max_logprobs=max(20, how.top_logprobs),
            enforce_eager=enforce_eager,
            distributed_executor_backend="uni",
            skip_tokenizer_init=not how.stop,  # it is for stop strings alone
            gpu_memory_utilization=gpu_memory_utilization,
            enable_sleep_mode=self.sleeps,
            seed=how.seed or 0,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **options,
        )
        # vLLM seeds every generator of the process; the trainer's draws must not depend on when an engine starts.
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        self.step, self.round = 0, 0
        self.asleep, self.lora, self.loras = False, None, 0

    def generate(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        from vllm import SamplingParams

        self._wake()
        seeds = request_seeds(self.sampling.seed, self.step, self.round, len(prompts))
        self.round += 1
        options = self.sampling.for_vllm() | {"detokenize": bool(self.sampling.stop), "flat_logprobs": True}
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
            Rollout(ids, list(out.token_ids), self.step, out.finish_reason, self._top(out.logprobs))
            for ids, out in zip(prompts, (request.outputs[0] for request in outputs), strict=True)
        ]

    def _top(self, flat: Any) -> np.ndarray | None:
        """Of each position vLLM lists the sampled token and then the likeliest ones."""
        if not self.sampling.top_logprobs:
            return None
        return np.array(flat.logprobs, np.float32).reshape(len(flat), -1)[:, 1:]

    def sync_weights(self, model: Weights, step: int) -> None:
        self._wake()
        if isinstance(model, Adapter):
            self._send_adapter(model)
        elif self.lora_rank:
            raise RolloutConfigError("this engine was made for LoRA adapters (lora_rank); it takes no whole weights")
        else:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_weights(model)})
        self.llm.reset_prefix_cache()
        self.step, self.round = step, 0

    def _send_adapter(self, adapter: Adapter) -> None:
        """Under a new id each time, since vLLM takes an id that it knows for the adapter that it knows."""
        from vllm.lora.request import LoRARequest

        old, self.loras = self.lora, self.loras + 1
        folder = tempfile.mkdtemp(prefix="sekd-adapter-")
        try:
            adapter.save(folder)
            new = LoRARequest(f"adapter-{self.loras}", self.loras, folder)
            if old is not None:
                self.llm.llm_engine.remove_lora(old.lora_int_id)
            self.llm.llm_engine.add_lora(new)  # it reads the file now, so that it may go
        except (ValueError, RuntimeError) as error:
            raise RolloutConfigError(
                f"vLLM cannot take this LoRA adapter ({error}); choose other lora_target_modules"
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
