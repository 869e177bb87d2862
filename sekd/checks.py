"""What a trainer cannot work with, found before any model is loaded."""

from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from rollouts import RolloutEngine
from sekd.config import SEKDConfig


def check_inputs(
    args: SEKDConfig,
    train_dataset: Dataset | IterableDataset,
    init: dict[str, Any],
    peft_config: PeftConfig | None,
    is_quantized: bool,
    rollout_engine: RolloutEngine | None,
) -> None:
    """Raise ValueError, with the remedy, for data, students and engines that do not go together."""
    if peft_config is not None and peft_config.is_prompt_learning:
        raise ValueError(f"peft_type {peft_config.peft_type} adds virtual tokens, which shift the rows; use LoRA")
    quantized = init.get("quantization_config") is not None or is_quantized
    if quantized and peft_config is None:
        raise ValueError("a quantized student cannot be trained in full: set use_peft: true")
    if quantized and args.lmbda > 0 and args.rollout_engine != "hf":
        raise ValueError(f"rollout_engine {args.rollout_engine!r} cannot take a quantized student; use hf")

    if isinstance(train_dataset, IterableDataset):
        if args.max_steps <= 0:
            raise ValueError("a stream has no length: set max_steps to the number of optimizer steps")
        args.check_stream()
        if args.teacher_cache is not None and args.sample_pool is None:
            raise ValueError(
                "teacher_cache needs data that can be counted; set sample_pool, or dataset_streaming: false"
            )
    if args.world_size > 1 and args.lmbda > 0 and args.rollout_engine == "vllm" and rollout_engine is None:
        raise ValueError("rollout_engine 'vllm' works with a single process; use vllm_server (or hf) with several")
    if is_deepspeed_zero3_enabled():
        raise ValueError("DeepSpeed ZeRO-3 would shard the teacher too; use FSDP2, or ZeRO stage 2")
