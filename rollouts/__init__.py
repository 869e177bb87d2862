"""Generation for on-policy distillation: token ids in, token ids out. Does not know about distillation."""

from rollouts.base import (
    Adapter,
    BaseEngine,
    EngineSetup,
    Rollout,
    RolloutConfigError,
    RolloutEngine,
    RolloutError,
    Sampling,
    get_logprobs,
    get_trait,
)
from rollouts.hf import HFEngine
from rollouts.vllm_local import VLLMEngine
from rollouts.vllm_server import VLLMServerEngine

ENGINES: dict[str, type[BaseEngine]] = {"vllm": VLLMEngine, "vllm_server": VLLMServerEngine, "hf": HFEngine}
"""Engines by the name that ``rollout_engine`` gives them. Add your own: a subclass of BaseEngine with ``start``."""

__all__ = [
    "ENGINES",
    "Adapter",
    "BaseEngine",
    "EngineSetup",
    "HFEngine",
    "Rollout",
    "RolloutConfigError",
    "RolloutEngine",
    "RolloutError",
    "Sampling",
    "VLLMEngine",
    "VLLMServerEngine",
    "get_logprobs",
    "get_trait",
]
