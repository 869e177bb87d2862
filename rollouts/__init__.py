"""Generation for on-policy distillation: token ids in, token ids out. Knows nothing of distillation."""

from rollouts.base import Adapter, Rollout, RolloutConfigError, RolloutEngine, RolloutError, Sampling
from rollouts.hf import HFEngine
from rollouts.vllm_local import VLLMEngine
from rollouts.vllm_server import VLLMServerEngine

__all__ = [
    "Adapter",
    "HFEngine",
    "Rollout",
    "RolloutConfigError",
    "RolloutEngine",
    "RolloutError",
    "Sampling",
    "VLLMEngine",
    "VLLMServerEngine",
]
