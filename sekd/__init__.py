"""Selective knowledge distillation of large language models (arXiv 2602.01395)."""

from typing import Any

__all__ = ["SEKDConfig", "SEKDTrainer"]


def __getattr__(name: str) -> Any:
    # Lazily: `sekd --help` and the pure modules should not wait for transformers' trainer.
    if name == "SEKDConfig":
        from sekd.config import SEKDConfig

        return SEKDConfig
    if name == "SEKDTrainer":
        from sekd.trainer import SEKDTrainer

        return SEKDTrainer
    raise AttributeError(f"module 'sekd' has no attribute {name!r}")
