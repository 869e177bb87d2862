"""The student before it trains: loaded with the adapter that it has, or given a new one."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, set_seed
from transformers.utils.peft_utils import find_adapter_config_file

from sekd.config import SEKDConfig
from sekd.models import load_model

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

HALF = {kind: str(kind).removeprefix("torch.") for kind in (torch.bfloat16, torch.float16)}


def find_adapter(name: str, revision: str | None = None) -> "PeftConfig | None":
    """The configuration of the adapter that a folder or hub id holds; None for a whole model.

    Raises:
        ValueError: a folder holds both, or the adapter does not name its base.
    """
    if find_adapter_config_file(name, revision=revision) is None:
        return None
    from peft import PeftConfig

    if os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(
            f"{name!r} holds a whole model (config.json) and an adapter (adapter_config.json), perhaps of two runs; "
            "move the files of one of them to another folder"
        )
    adapter = PeftConfig.from_pretrained(name, revision=revision)
    if adapter.base_model_name_or_path is None:
        raise ValueError(f"the adapter {name!r} lacks base_model_name_or_path: add it to its adapter_config.json")
    return adapter


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a model, or of the base below an adapter."""
    adapter = find_adapter(name, revision)
    if adapter is not None:
        name, revision = str(adapter.base_model_name_or_path), adapter.revision
    return AutoConfig.from_pretrained(name, revision=revision)


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
            output_dir whose models the trained student would replace.
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
    check_folder(
        str(args.output_dir),
        {
            "the student": model if isinstance(model, str) else getattr(model, "name_or_path", None),
            "the base of the student's adapter": adapter and adapter.base_model_name_or_path,
            "the teacher": args.teacher_model_name_or_path,
        },
    )
    return adapter or peft_config


def check_folder(folder: str, models: Mapping[str, str | None]) -> None:
    """Raise ValueError if a student saved into the folder would replace one of the models, given by role."""
    for role, name in models.items():
        if name and os.path.realpath(name) == os.path.realpath(folder):
            raise ValueError(f"output_dir {folder!r} holds {role}, which the student would replace; name another")


def load_student(name: str, args: SEKDConfig, **init: Any) -> Any:
    """The student ``name``. An adapter is loaded onto its base, to train on from where it is."""
    adapter, revision = find_adapter(name, init.get("revision")), init.get("revision")
    if adapter is None:
        return load_model(name, **init)
    from peft import PeftModel

    base = load_model(str(adapter.base_model_name_or_path), **init | {"revision": adapter.revision})
    return PeftModel.from_pretrained(_prepare_quantized(base, args), name, is_trainable=True, revision=revision)


def prepare_student(
    model: Any, peft_config: "PeftConfig | None", args: SEKDConfig, revision: str | None, optimizer: Any
) -> Any:
    """The student as it trains: with a new adapter if ``peft_config`` asks for one.

    Raises:
        ValueError: as :func:`check_trainable`.
    """
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
