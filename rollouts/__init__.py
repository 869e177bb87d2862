"""Generation for on-policy distillation: token ids in, token ids out. Knows nothing of distillation."""

from rollouts.base import Rollout, RolloutEngine, RolloutError
from rollouts.hf import HFEngine
from rollouts.vllm_local import VLLMEngine
from rollouts.vllm_server import VLLMServerEngine

__all__ = ["HFEngine", "Rollout", "RolloutEngine", "RolloutError", "VLLMEngine", "VLLMServerEngine"]
