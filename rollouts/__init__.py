"""Generation for on-policy distillation: token ids in, token ids out. Knows nothing of distillation."""

from rollouts.base import Rollout, RolloutEngine
from rollouts.hf import HFEngine
from rollouts.vllm_local import VLLMEngine

__all__ = ["HFEngine", "Rollout", "RolloutEngine", "VLLMEngine"]
