"""The student's weights for a rollout engine: all weights, the base weights below an adapter, or the adapter alone."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rollouts import Adapter
from sekd.models import causal_lm, unwrap


def full_weights(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """The student's weights under their names in transformers, one whole tensor at a time.

    Shards are gathered, and adapters are merged into copies, in ``dtype`` if it is given. The training weights never
    change, so they cannot drift.
    Under FSDP2 every rank must consume the whole iterator.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    lm = causal_lm(model)
    layers: dict[str, Any] = {}
    for name, layer in lm.named_modules():  # parents come first
        if isinstance(layer, BaseTunerLayer) and not any(name.startswith(f"{outer}.") for outer in layers):
            layers[name] = layer
    for name, layer in layers.items():
        merged = copy.deepcopy(layer).to(dtype)  # one layer at a time; PEFT's merge handles DoRA, biases and embeddings
        for part in merged.modules():  # lora_target_parameters of one module are layers within each other
            if isinstance(part, BaseTunerLayer):
                part.merge()
        for leaf, tensor in merged.get_base_layer().state_dict().items():
            yield f"{name}.{leaf}", _gather(tensor)
    for name, tensor in lm.state_dict().items():
        if ".original_module." in name or any(name.startswith(f"{layer}.") for layer in layers):
            continue
        yield name.replace(".modules_to_save.default", ""), _gather(tensor)


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base weights of a LoRA student under their checkpoint names.

    A weight that is both input and output embedding comes once, under its first name, which is the name vLLM loads.
    """
    seen = set()
    for name, tensor in causal_lm(model).state_dict(keep_vars=True).items():
        if ".lora_" not in name and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name.replace(".base_layer.", "."), _gather(tensor)


SERVED_LORA = (
    {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    | {"task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"}
)
"""Fields of a LoraConfig that vLLM reads as PEFT does, or that change no result. Others must have their defaults."""


def extract_adapter(model: nn.Module) -> Adapter | None:
    """The student's adapter with whole tensors, or None if vLLM could not apply it.

    vLLM applies plain LoRA on linear layers, except the LM head. Other students send :func:`full_weights`.
    Under FSDP2 every rank must call this.
    """
    from peft import LoraConfig, get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    inner: Any = unwrap(model)
    configs = getattr(inner, "peft_config", {})
    if [*configs] != ["default"] or type(configs["default"]) is not LoraConfig:
        return None
    settings, defaults = configs["default"].to_dict(), LoraConfig().to_dict()
    if settings["init_lora_weights"] in (False, "gaussian"):  # other initialisations may change the base weights
        settings["init_lora_weights"] = True
    if any(settings[name] != defaults[name] for name in defaults.keys() - SERVED_LORA):
        return None
    layers = {n: m for n, m in causal_lm(model).named_modules() if isinstance(m, BaseTunerLayer)}
    if any("lm_head" in n or not isinstance(m.get_base_layer(), nn.Linear) for n, m in layers.items()):
        return None
    if not all(map(_is_as_configured, layers.values())):
        return None
    if any(parameter.requires_grad and "lora_" not in name for name, parameter in inner.named_parameters()):
        return None  # base weights are trained too
    settings |= {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
    settings |= {name: sorted(value) for name, value in settings.items() if isinstance(value, set)}
    weights = get_peft_model_state_dict(inner, save_embedding_layers=False)
    return Adapter(settings, {name: _gather(tensor) for name, tensor in weights.items()})


def _is_as_configured(layer: Any) -> bool:
    """Whether a LoRA layer works as its configuration says: not merged, disabled or rescaled."""
    rank, alpha = layer.r["default"], layer.lora_alpha["default"]
    scaling = alpha / (math.sqrt(rank) if layer.use_rslora.get("default", False) else rank)
    is_active = layer.active_adapters == ["default"] and not layer.merged and not layer.disable_adapters
    return is_active and math.isclose(layer.scaling["default"], scaling)


def check_mergeable(model: nn.Module) -> None:
    """Raise ValueError for an adapter whose merged weights no checkpoint of the student's kind can hold."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    remedy = "use rollout_engine: hf without merge_adapter"
    lm = causal_lm(model)
    adapted = [n for n, m in lm.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    tied = {"embed_tokens", "lm_head"} & {name.rpartition(".")[2] for name in adapted}
    if any(name.endswith("token_adapter") for name in adapted):
        raise ValueError(f"trainable_token_indices cannot be merged into whole weights; {remedy}")
    if tied and lm.config.get_text_config().tie_word_embeddings:
        raise ValueError(
            f"the adapter changes {' and '.join(sorted(tied))}, but this student has one weight for input and output, "
            "so nothing can load the merged weights; leave them out of lora_target_modules and lora_modules_to_save, "
            f"or {remedy}"
        )


def _gather(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
