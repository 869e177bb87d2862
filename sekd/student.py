"""The student before it trains: loaded with the adapter that it has, or given a new one."""

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from sekd.config import SEKDConfig
from sekd.models import load_model
from sekd.offloading import offload_activations
from sekd.pretrained import STUDENT, find_adapter, load_config
from sekd.validation.rollouts import engine_trait

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

    from rollouts import RolloutEngine

HALF = {kind: str(kind).removeprefix("torch.") for kind in (torch.bfloat16, torch.float16)}


def check_student(
    model: str | nn.Module,
    peft_config: "PeftConfig | None",
    init: Mapping[str, Any],
    args: SEKDConfig,
    optimizer: Any,
) -> "PeftConfig | None":
    """Check a student before it is loaded, and return the configuration of its adapter: its own, or the new one.

    Raises:
        ValueError: a new adapter for a student that has one; weights that :func:`check_trainable` refuses; or an
            output_dir that holds the student, its base or its teacher.
    """
    if isinstance(model, str):
        adapter = find_adapter(model, init.get("revision"))
    else:
        adapter = next(iter(getattr(model, "peft_config", {}).values()), None)
    if adapter is not None and peft_config is not None:
        raise ValueError(
            "peft_config asks for a new adapter, but the student has one; leave peft_config out to train that one, or "
            "merge it into the student first (merge_and_unload)"
        )
    if peft_config is None and not isinstance(model, str):
        check_trainable(model, optimizer)
    if (adapter or peft_config) is None and init.get("quantization_config") is None and optimizer is None:
        _refuse_half(init.get("dtype"))
    check_models_outside(
        str(args.output_dir),
        {
            "the student": model if isinstance(model, str) else getattr(model, "name_or_path", None),
            "the base of the student's adapter": adapter and adapter.base_model_name_or_path,
            "the teacher": args.teacher_model_name_or_path,
        },
    )
    return adapter or peft_config


def check_models_outside(folder: str, models: Mapping[str, str | None]) -> None:
    """Raise ValueError if a student saved into the folder would replace one of the models, given by role."""
    for role, name in models.items():
        if name and os.path.realpath(name) == os.path.realpath(folder):
            raise ValueError(f"output_dir {folder!r} holds {role}, which the student would replace; name another")


def check_context(
    args: SEKDConfig,
    model: Any,
    init: Mapping[str, Any],
    rollout_engine: "RolloutEngine | None",
) -> None:
    """Check that the student has a position for each token of a rollout, from its configuration alone.

    vLLM refuses to start otherwise. transformers goes on, beyond what the student was trained for.
    """
    if not args.any_on_policy or rollout_engine is not None or engine_trait(args, None, "shares_model"):
        return
    positions = count_positions(
        load_config(STUDENT, model, init.get("revision")) if isinstance(model, str) else model.config
    )
    if args.max_prompt_length + args.max_completion_length > positions:
        raise ValueError(
            f"max_prompt_length {args.max_prompt_length} + max_completion_length {args.max_completion_length} is more "
            f"than the {positions:g} positions of the student (max_position_embeddings); lower one of them"
        )


def count_positions(config: Any) -> float:
    """The number of tokens that a model can read, from its configuration; infinite if that does not say."""
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is None:
        return math.inf
    factor = (getattr(text_config, "rope_parameters", None) or {}).get("factor") or 1  # some lengthen it
    return positions * factor if isinstance(factor, int | float) else positions


def load_student(name: str, args: SEKDConfig, **init: Any) -> Any:
    """The student ``name``. An adapter is loaded onto its base, to train on from where it is."""
    adapter, revision = find_adapter(name, init.get("revision")), init.get("revision")
    if adapter is None:
        return _keep_trainable(load_model(name, **init))
    from peft import PeftModel

    base = _keep_trainable(load_model(str(adapter.base_model_name_or_path), **init | {"revision": adapter.revision}))
    return PeftModel.from_pretrained(_prepare_quantized(base, args), name, is_trainable=True, revision=revision)


def prepare_student(
    model: Any, peft_config: "PeftConfig | None", args: SEKDConfig, revision: str | None, optimizer: Any
) -> Any:
    """The student as it trains: with a new adapter if ``peft_config`` asks for one.

    Raises:
        ValueError: as :func:`check_trainable`; or 4-bit weights that pass no gradient.
    """
    _keep_trainable(model)
    if peft_config is not None:
        from peft import get_peft_model

        set_seed(args.seed)  # an adapter starts from random weights
        revision = None if revision == "main" else revision
        model = get_peft_model(_prepare_quantized(model, args), peft_config, revision=revision)
    for config in getattr(model, "peft_config", {}).values():
        base = config.base_model_name_or_path
        if base is not None and os.path.isdir(base):
            config.base_model_name_or_path = os.path.abspath(base)  # checkpoints name it, wherever they are read
    check_trainable(model, optimizer)
    if args.activation_offloading:
        offload_activations(model)
    return model


def check_trainable(model: nn.Module, optimizer: Any) -> None:
    """Check that a student has weights to train, and none of them in half precision.

    Raises:
        ValueError: no weights to train; or half precision, which rounds small updates away, unless the user passes an
            ``optimizer``, which may do better.
    """
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if not kinds:
        raise ValueError(
            "the student has no weights to train: they are all frozen. Load an adapter with "
            "PeftModel.from_pretrained(base, adapter, is_trainable=True), or pass its folder as model"
        )
    for kind in kinds if optimizer is None else ():
        _refuse_half(kind)


def _refuse_half(dtype: Any) -> None:
    for kind, name in HALF.items():
        if dtype in (kind, name):
            raise ValueError(
                f"the student's trainable weights are {name}, which rounds small updates away: load it in float32 "
                "(dtype: float32, or model.float(); bf16: true still computes in bf16), or train an adapter (use_peft)"
            )


def _keep_trainable(model: Any) -> Any:
    """The model, whose 4-bit weights pass gradients after a forward pass in evaluation mode too.

    On CPUs with AVX512-bf16, bitsandbytes packs them for inference in such a pass, and never back. Packed weights pass
    no gradient to the layers below.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError(
                    "the student generated or was evaluated before, so its 4-bit weights are packed for inference and "
                    "pass no gradient; load it again, or pass its folder as model"
                )
            module.support_avx512bf16_for_cpu = False
    return model


def _prepare_quantized(model: Any, args: SEKDConfig) -> Any:
    if not getattr(model, "is_quantized", False):
        return model
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, args.gradient_checkpointing)


def check_continued(wanted: "LoraConfig", default: "LoraConfig", saved: "PeftConfig") -> None:
    """Raise ValueError if a setting of ``wanted`` is not its ``default`` and not that of the saved adapter."""
    for field, value in vars(wanted).items():
        own = getattr(saved, field, None)
        if _as_set(value) in (_as_set(getattr(default, field)), _as_set(own)):
            continue
        if field == "target_modules" and _find_targets(wanted, saved) == _find_targets(saved, saved):
            continue
        key = field if field.startswith(("use_", "lora_")) else f"lora_{field}"
        raise ValueError(
            f"{key} {value!r} contradicts the adapter that model_name_or_path names, which has {own!r}: remove {key}, "
            "or name a whole student to start a new adapter"
        )


def _as_set(value: Any) -> Any:
    return {*value} if isinstance(value, list | tuple | set) else value


def _find_targets(config: "PeftConfig", saved: "PeftConfig") -> set[str]:
    """The modules of the saved adapter's base that ``config`` adapts, however it names them. No weight is loaded."""
    from peft import PeftConfig, get_peft_model

    base = AutoConfig.from_pretrained(saved.base_model_name_or_path, revision=saved.revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base)
    copy = PeftConfig.from_peft_type(**config.to_dict())
    return {*get_peft_model(model, copy, low_cpu_mem_usage=True).targeted_module_names}
