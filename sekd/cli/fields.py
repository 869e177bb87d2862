"""The keys of a recipe, by group, as ``sekd train --help`` shows them.

``python -m sekd.cli.fields`` writes them to train_help.txt. Showing that file needs no import of the fields.
"""

import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any

import yaml

from sekd.cli.train import HELP_FILE

GROUPS: dict[str, tuple[str, ...]] = {
    "models": (
        "model_name_or_path",
        "teacher_model_name_or_path",
        "model_revision",
        "teacher_model_revision",
        "dtype",
        "teacher_dtype",
        "teacher_load_in_4bit",
        "teacher_load_in_8bit",
        "teacher_device",
        "teacher_fsdp",
        "attn_implementation",
    ),
    "data": (
        "dataset_name",
        "dataset_config",
        "dataset_train_split",
        "dataset_test_split",
        "dataset_streaming",
        "shuffle_buffer",
        "dataset_num_proc",
        "prompt_column",
        "completion_column",
        "messages_column",
        "text_column",
        "prompt_template",
        "use_chat_template",
        "chat_template_kwargs",
        "system_prompt",
        "eos",
        "max_length",
        "max_prompt_length",
        "overlong_prompts",
        "packing",
        "text_prompt_length",
        "supervise_prompt",
        "teacher_system_prompt",
        "teacher_prompt_prefix",
    ),
    "what is distilled: positions and divergence": (
        "lmbda",
        "position_score",
        "position_policy",
        "position_fraction",
        "divergence",
        "kd_weight",
        "kd_temperature",
        "position_skip",
        "score_normalization",
        "score_source",
        "score_logprobs",
        "import_modules",
    ),
    "options of policies and divergences": (),
    "classes": ("class_selection", "class_samples", "sampled_softmax"),
    "samples": ("sample_fraction", "sample_score", "sample_pool", "samples_file"),
    "the teacher cache": ("teacher_cache", "cache_teacher_entropy"),
    "rollouts": (
        "rollout_engine",
        "max_completion_length",
        "rollouts_per_prompt",
        "rollout_batches",
        "rollout_staleness",
        "rollout_server_urls",
        "rollout_timeout",
        "rollout_transfer",
        "save_rollouts",
        "rollouts",
        "log_completions_steps",
        "vllm_gpu_memory_utilization",
        "vllm_enforce_eager",
        "vllm_sleep",
        "vllm_kv_cache_gib",
    ),
    "sampling": ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_strings"),
    "training": (
        "max_steps",
        "max_tokens",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "optim",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "max_grad_norm",
        "seed",
        "data_seed",
        "bf16",
        "fp16",
        "gradient_checkpointing",
        "activation_offloading",
        "head_chunk_rows",
        "train_sampling_strategy",
        "dataloader_num_workers",
        "use_cpu",
        "fsdp",
    ),
    "LoRA and quantization": (
        "use_peft",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "lora_modules_to_save",
        "use_rslora",
        "use_dora",
        "merge_adapter",
        "load_in_4bit",
        "load_in_8bit",
        "bnb_4bit_quant_type",
        "use_bnb_nested_quant",
    ),
    "evaluation": (
        "eval_strategy",
        "eval_steps",
        "eval_on_start",
        "eval_dataset_name",
        "max_eval_samples",
        "per_device_eval_batch_size",
        "eval_suite",
        "eval_limit",
        "eval_data_dir",
        "eval_chat_template",
        "metric_for_best_model",
        "greater_is_better",
        "load_best_model_at_end",
        "early_stopping_patience",
        "early_stopping_threshold",
    ),
    "output and logging": (
        "output_dir",
        "resume_from_checkpoint",
        "overwrite_output_dir",
        "logging_steps",
        "logging_first_step",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_only_model",
        "save_on_signal",
        "record_selection",
        "profile",
        "report_to",
        "run_name",
        "disable_tqdm",
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "remove_unused_columns",
        "logging_nan_inf_filter",
    ),
}
"""The options are filled in from the records of policies and divergences."""

FOREIGN = {
    # TRL's ScriptArguments and ModelConfig
    "model_name_or_path": "Folder or hub id of the student.",
    "model_revision": "Branch, tag or commit of the student.",
    "dtype": "Weights of the student in memory: float32, bfloat16, float16, or auto as they were saved. A whole "
    "student must be float32 (bf16 then computes in bfloat16); the base of an adapter may have any.",
    "attn_implementation": "Attention of both models: eager, sdpa, flash_attention_2, or a kernel's name on the hub.",
    "dataset_name": "Training rows: a json, jsonl, csv or parquet file, a folder or glob of them, or a hub id.",
    "dataset_config": "Configuration (subset) of a hub dataset.",
    "dataset_train_split": "Split to train on; a slice such as train[64:] works too.",
    "dataset_test_split": "Split to evaluate on; a local file needs a slice here, such as train[:64].",
    "dataset_streaming": "Read the data as a stream instead of downloading it first.",
    "use_peft": "Train a LoRA adapter instead of the whole student; if model_name_or_path is an adapter, that one.",
    "lora_r": "Rank of the adapter.",
    "lora_alpha": "Scale of the adapter: its product is multiplied by lora_alpha / lora_r.",
    "lora_dropout": "Dropout in front of the adapter.",
    "lora_target_modules": "Layers that get an adapter, by name; PEFT's choice for the model type if not given.",
    "lora_modules_to_save": "Layers that are trained whole beside the adapter.",
    "use_rslora": "Scale by lora_alpha / sqrt(lora_r), which suits high ranks.",
    "use_dora": "Train magnitude and direction of the weights apart (DoRA).",
    "load_in_4bit": "Hold the frozen student in 4 bits (QLoRA); needs use_peft and bitsandbytes, and on-policy "
    "rollout_engine hf.",
    "load_in_8bit": "Hold the frozen student in 8 bits; needs what load_in_4bit needs.",
    "bnb_4bit_quant_type": "4-bit data type: nf4 or fp4.",
    "use_bnb_nested_quant": "Quantize the scales of 4-bit weights too.",
    # transformers' TrainingArguments
    "max_steps": "Optimizer steps; above 0 it beats num_train_epochs.",
    "num_train_epochs": "Passes over the data; a fraction is allowed.",
    "per_device_train_batch_size": "Sequences of a micro-batch on each device.",
    "gradient_accumulation_steps": "Micro-batches of an optimizer step; the loss is the mean over all their sequences.",
    "lr_scheduler_type": "How the learning rate changes: linear, cosine, constant, constant_with_warmup, ...",
    "warmup_steps": "Steps in which the learning rate rises from 0; below 1, the share of all steps.",
    "optim": "Optimizer: adamw_torch_fused, adamw_torch, adamw_8bit (needs bitsandbytes), adafactor, ...",
    "weight_decay": "Weight decay of AdamW; biases and norms have none.",
    "adam_beta1": "Decay of AdamW's mean of the gradients.",
    "adam_beta2": "Decay of AdamW's mean of the squared gradients.",
    "max_grad_norm": "Clip the gradient's norm to this; 0 does not clip.",
    "seed": "Seed of all draws: data order, positions, classes, rollouts, the adapter's initial weights.",
    "data_seed": "Seed of the data order alone; seed if not given.",
    "fp16": "fp16 autocast with loss scaling, for GPUs without bf16.",
    "gradient_checkpointing": "Compute activations again in the backward pass: less memory, slower steps.",
    "train_sampling_strategy": "Order of the data: random or sequential.",
    "dataloader_num_workers": "Processes that load data beside each training process.",
    "use_cpu": "Train on the CPU although there is a GPU.",
    "eval_strategy": "When to evaluate: no, steps (every eval_steps) or epoch.",
    "eval_steps": "Steps between evaluations; logging_steps if not given.",
    "metric_for_best_model": "Which number of an evaluation makes a checkpoint the best: loss, "
    "validation_accuracy, ...",
    "greater_is_better": "Whether more of metric_for_best_model is better. Default: yes, but not for losses and the "
    "like.",
    "load_best_model_at_end": "Keep the best checkpoint, and end with its weights.",
    "eval_on_start": "Evaluate once before the first step.",
    "per_device_eval_batch_size": "Sequences of a batch on each device in evaluation and in sample scoring.",
    "output_dir": "Folder of the student, checkpoints, metrics and samples; trainer_output if not given.",
    "logging_first_step": "Log the first step too.",
    "save_strategy": "When to save a checkpoint: no, steps (every save_steps) or epoch.",
    "save_steps": "Steps between checkpoints; below 1, a share of all steps.",
    "save_total_limit": "Keep only this number of checkpoints, the newest.",
    "save_only_model": "Leave optimizer and random states out of checkpoints: smaller, but no run can resume.",
    "report_to": "Trackers to report to: wandb, tensorboard, trackio, ..., all or none.",
    "run_name": "Name of the run in the trackers.",
    "disable_tqdm": "Show no progress bars.",
    "push_to_hub": "Upload the student, its card and its recipe to the Hugging Face hub.",
    "hub_model_id": "Repository to upload to; the name of output_dir if not given.",
    "hub_strategy": "When: end, every_save (the student of each checkpoint too), checkpoint or all_checkpoints (whole "
    "checkpoints too).",
}
"""Help for keys of other libraries that recipes often use."""


def list_fields() -> dict[str, Field]:
    """Every key of a recipe and its dataclass field. SEKDConfig comes last, so its own fields win."""
    from trl import ModelConfig, ScriptArguments

    from sekd.config import SEKDConfig

    return {f.name: f for record in (ScriptArguments, ModelConfig, SEKDConfig) for f in fields(record) if f.init}


def list_own_fields() -> list[str]:
    """The fields that sekd defines, or defines again with another default."""
    from sekd.config import SEKDConfig
    from sekd.selection_config import SelectionConfig

    names = SEKDConfig.__annotations__ | SelectionConfig.__annotations__
    return [f.name for f in fields(SEKDConfig) if f.name in names and f.init]


def list_groups() -> dict[str, tuple[str, ...]]:
    """The groups of the help, each with its keys."""
    from sekd.registry import all_options

    return {title: names or tuple(all_options()) for title, names in GROUPS.items()}


def format_help() -> str:
    """The text of train_help.txt."""
    known, own, groups = list_fields(), list_own_fields(), list_groups()
    lines = ["keys of a recipe, with their defaults (null: not set):"]
    for title, names in groups.items():
        lines += ["", f"{title}:"]
        for name in names:
            lines += _format_field(known[name], known[name].metadata["help"] if name in own else FOREIGN[name])
    return "\n".join(lines) + "\n"


def _format_field(field: Field, text: str) -> Iterator[str]:
    yield f"  {field.name}: {format_default(field)}"
    yield textwrap.fill(text.replace("%%", "%"), 110, initial_indent=" " * 6, subsequent_indent=" " * 6)


def format_default(field: Field) -> str:
    """The default of a field as a recipe would spell it."""
    value: Any = field.default_factory() if field.default_factory is not MISSING else field.default
    if isinstance(value, Enum):
        value = value.value
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def main() -> None:
    text = format_help()
    with open(HELP_FILE, "w", encoding="utf-8") as file:
        file.write(text)
    print(f"wrote {HELP_FILE}")


if __name__ == "__main__":
    main()
