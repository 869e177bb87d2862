"""Which values of transformers' and TRL's own fields work, and which have no effect in sekd."""

import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from accelerate.utils import parse_flag_from_env
from huggingface_hub import constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import logging

from sekd.metric_kinds import find_kind
from sekd.validation.values import get_default, is_installed, show

if TYPE_CHECKING:
    from sekd.config import SEKDConfig

logger = logging.get_logger(__name__)

AT_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("max_eval_samples", "dataloader_prefetch_factor", "ddp_timeout"), 1),
    **dict.fromkeys(("eval_limit", "early_stopping_patience"), 1),
    **dict.fromkeys(("dataset_num_proc", "max_tokens"), 1),
    **dict.fromkeys(("early_stopping_threshold", "shuffle_buffer"), 0),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps"), 0),
    **dict.fromkeys(("dataloader_num_workers", "eval_delay", "seed", "data_seed", "profile", "record_selection"), 0),
}
"""The lowest value of numbers that transformers checks late or not at all."""

NO_EFFECT = {
    "label_smoothing_factor": "sekd's loss smooths no labels",
    "prediction_loss_only": "sekd's evaluation always gives all its metrics",
    "include_for_metrics": "compute_metrics gets predictions and labels",
    "batch_eval_metrics": "compute_metrics runs once, after all batches",
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "evaluation has the precision of training, bf16 or fp16"),
}
"""Fields that sekd does not read, and why."""

MODULES = {"azure_ml": "azureml", "flyte": "flytekit"}
"""Trackers whose module has another name."""


def choose_better_direction(args: "SEKDConfig") -> bool | None:
    """``greater_is_better`` where it is set, else by the name of ``metric_for_best_model``.

    Raises:
        ValueError: neither direction of this metric is better.
    """
    metric = args.metric_for_best_model
    if args.greater_is_better is not None or metric is None:
        return args.greater_is_better
    kind = find_kind(metric)
    if kind is not None and kind.higher_is_better is None:
        raise ValueError(
            f"metric_for_best_model {metric!r} is not better in either direction: set greater_is_better to what you "
            "want, or name another metric"
        )
    return kind is None or bool(kind.higher_is_better)


def check_budget(args: "SEKDConfig", packed: bool) -> None:
    """Check that ``max_tokens``, if it is set, counts tokens of sequences of ``max_length``.

    Raises:
        ValueError: the samples are not packed, so their lengths differ.
    """
    if args.max_tokens is not None and not packed:
        raise ValueError(
            f"max_tokens {args.max_tokens} counts sequences of max_length tokens, and only plain text that is packed "
            "has them (packing: true, lmbda: 0, no text_prompt_length); set max_steps instead"
        )


def count_steps(args: "SEKDConfig", tokens: int) -> int:
    """The optimizer steps that read at least this number of tokens, in full sequences of ``max_length``.

    Raises:
        ValueError: ``max_steps`` says otherwise.
    """
    steps = -(-tokens // (args.max_length * args.sequences_per_step))
    if args.max_steps not in (-1, steps):  # recipe.yaml of a run has both
        raise ValueError(
            f"max_steps {args.max_steps} and max_tokens {tokens}, which means {steps} steps of "
            f"{args.sequences_per_step} x {args.max_length} tokens: leave one of them out"
        )
    return steps


def check_training(args: "SEKDConfig") -> None:
    """Check steps, batches, trackers, folders and packages."""
    for name, low in AT_LEAST.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"{name} {value} must be at least {low}")
    for name in ("seed", "data_seed"):
        if (getattr(args, name) or 0) >= 2**32:
            raise ValueError(f"{name} {getattr(args, name)} must be below 2^32")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"{name} {getattr(args, name)} is outside [0, 1)")
    for name in ("logging_steps", "save_steps", "eval_steps"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} {value} must be above 0")
    if args.max_steps < 1 and args.max_steps != -1:
        raise ValueError(f"max_steps {args.max_steps} trains nothing; set it to at least 1, or leave it out")
    check_budget(args, args.packing and not args.any_on_policy and args.text_prompt_length is None)
    if args.num_train_epochs <= 0:
        raise ValueError(f"num_train_epochs {args.num_train_epochs} trains nothing; set it above 0, or leave it out")
    for name, reason in NO_EFFECT.items():
        if getattr(args, name) != get_default(args, name):
            raise ValueError(f"{name} {show(getattr(args, name))} has no effect: {reason}; leave it out")
    _check_evaluation(args)
    _check_early_stopping(args)
    for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode"):
        if getattr(args, name):
            raise ValueError(f"{name} is not supported: sekd calls the student in parts; leave it out")
    if args.enable_jit_checkpoint:
        raise ValueError(
            "enable_jit_checkpoint: true is not supported; leave it out: save_on_signal saves a whole checkpoint on "
            "SIGTERM"
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size: true is not supported: when memory runs out, it starts again with the weights and "
            "optimizer of the failed attempt; set it to false, halve per_device_train_batch_size and double "
            "gradient_accumulation_steps"
        )
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy {args.train_sampling_strategy!r} is not supported: samples of similar length "
            "share a micro-batch in any case; set it to random or sequential"
        )
    if _is_of_bitsandbytes(args.optim) and not is_installed("bitsandbytes"):
        raise ValueError(f"optim {_spell(args.optim)} needs bitsandbytes: run `pip install bitsandbytes`")
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel true is not supported: sekd calls the student in parts, so Liger's fused loss would not "
            "run, and its other kernels are untested in sekd; leave it out"
        )
    if isinstance(args.accelerator_config, dict):
        _check_keys("accelerator_config", args.accelerator_config, AcceleratorConfig.__dataclass_fields__)
    if args.deepspeed and not is_installed("deepspeed"):
        raise ValueError(f"deepspeed {show(args.deepspeed)} needs deepspeed: run `pip install deepspeed`")
    _check_trackers(args.report_to)
    _check_output_dir(args.output_dir)
    _check_hub(args)


def _spell(optim: Any) -> str:
    return str(getattr(optim, "value", optim))


def _is_of_bitsandbytes(optim: Any) -> bool:
    name = _spell(optim)
    return "torch" not in name and any(part in name for part in ("8bit", "bnb", "paged", "lion", "ademamix"))


def check_memory(args: "SEKDConfig") -> None:
    """Check what saves memory: optimizers of bitsandbytes, and offloaded activations."""
    in_shards = args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if in_shards and _is_of_bitsandbytes(args.optim):
        raise ValueError(
            f"optim {_spell(args.optim)} with FSDP: bitsandbytes cannot update weights in shards; set optim: "
            "adamw_torch_fused, whose states are shared between the processes, or use DDP"
        )
    if not args.activation_offloading:
        return
    if args.use_cpu:
        raise ValueError(
            "activation_offloading true has no effect on a CPU, whose memory holds the activations already; leave it "
            "out"
        )
    if in_shards:
        raise ValueError(
            "activation_offloading true with FSDP: the gathered weights of each layer would move with its activations; "
            "set gradient_checkpointing: true, or use DDP"
        )


def _check_evaluation(args: "SEKDConfig") -> None:
    if args.eval_strategy == "no" and not args.eval_on_start:
        for name, value in (("do_eval", "true"), ("eval_suite", args.eval_suite)):
            if getattr(args, name):
                remedy = "set eval_strategy: steps or epoch, or eval_on_start: true"
                logger.warning(f"{name} {value} has no effect alone; {remedy}")
    for name in ("eval_limit", "eval_data_dir", "eval_chat_template"):
        if not args.eval_suite and getattr(args, name) != get_default(args, name):
            raise ValueError(f"{name} {show(getattr(args, name))} has no effect without eval_suite; leave it out")


def _check_early_stopping(args: "SEKDConfig") -> None:
    if args.early_stopping_patience is None:
        if args.early_stopping_threshold:
            raise ValueError(
                f"early_stopping_threshold {args.early_stopping_threshold} has no effect without "
                "early_stopping_patience; set it, or leave the threshold out"
            )
        return
    if args.eval_strategy == "no":
        raise ValueError(
            f"early_stopping_patience {args.early_stopping_patience} counts evaluations: set eval_strategy: steps"
        )
    if args.metric_for_best_model is None and not args.load_best_model_at_end:
        raise ValueError(
            f"early_stopping_patience {args.early_stopping_patience} needs metric_for_best_model, such as loss, or "
            "validation_accuracy with eval_suite: [validation]"
        )


def _check_keys(name: str, mapping: Mapping[str, Any], known: Collection[str]) -> None:
    for key in mapping:
        if key not in known:
            raise ValueError(f"{name} has no key {key!r}; it has {', '.join(known)}")


def _check_trackers(report_to: Any) -> None:
    names = [report_to] if isinstance(report_to, str) else report_to or []
    if {*names} <= {"all", "none"}:
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise ValueError(f"report_to {name!r} is unknown; choose all, none, or some of {known}")
        if name not in get_available_reporting_integrations() and not is_installed(MODULES.get(name, name)):
            raise ValueError(f"report_to {name!r} is not installed; install it, or set report_to: none")


def _check_output_dir(folder: str | None) -> None:
    path = os.path.abspath(os.path.expanduser(folder or "."))
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise ValueError(f"output_dir {folder!r}: {path!r} is a file; name a folder")


def _check_hub(args: "SEKDConfig") -> None:
    if not args.push_to_hub:
        return
    if constants.HF_HUB_OFFLINE:
        raise ValueError("push_to_hub true, but HF_HUB_OFFLINE forbids the network; leave one of them out")
    name = args.hub_model_id or os.path.basename(os.path.abspath(str(args.output_dir)))
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub: no repository can be named {name!r}; set hub_model_id: user/name") from error
    if args.hub_token is None and get_token() is None:
        raise ValueError("push_to_hub needs a token of the hub: run `hf auth login`, or set HF_TOKEN")


def check_adapter(model: Any) -> None:
    """Check the adapter's fields of TRL's ModelConfig. Without an adapter they would be ignored."""
    names = [*type(model).__dataclass_fields__]
    lora = [name for name in names if name.startswith("lora_") or name in ("use_rslora", "use_dora")]
    quantization = [name for name in names if "bnb_" in name]
    for switch, options in (("use_peft", lora), ("load_in_4bit", quantization)):
        for name in options:
            if not getattr(model, switch) and getattr(model, name) != get_default(model, name):
                raise ValueError(
                    f"{name} {show(getattr(model, name))} has no effect without {switch}: set {switch}: true, or leave "
                    f"{name} out"
                )
    if model.lora_r < 1:
        raise ValueError(f"lora_r {model.lora_r} must be at least 1")
    if not 0 <= model.lora_dropout < 1:
        raise ValueError(f"lora_dropout {model.lora_dropout} is outside [0, 1)")
