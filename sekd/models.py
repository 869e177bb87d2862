"""Loading models and reaching into them: the one place that knows about wrappers, adapters and heads."""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from jaxtyping import Float
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rollouts import Adapter
from sekd.config import SEKDConfig
from sekd.heads import Head
from sekd.types import Batch


def load_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """A causal language model from a folder or hub id; ``kwargs`` are those of ``from_pretrained``."""
    return AutoModelForCausalLM.from_pretrained(name, **kwargs)


def load_teacher(name: str, args: SEKDConfig, attention: str | None = None) -> PreTrainedModel:
    """A teacher from a folder or hub id, with the revision and dtype that ``args`` give."""
    dtype, revision = args.teacher_dtype, args.teacher_model_revision
    return load_model(name, revision=revision, dtype=dtype, attn_implementation=attention)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP, FSDP and DeepSpeed; a PEFT model stays one."""
    return extract_model_from_parallel(model, keep_fp32_wrapper=True)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside every wrapper, with its LoRA layers in place."""
    inner: Any = unwrap(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def run_inside(model: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` as if it were the forward of the wrapped ``model``.

    DDP and FSDP gather and hook in the wrapper's own forward, so everything that touches parameters must
    happen there. Only tensors (in tuples and dicts) may be returned, or FSDP misses their gradients.
    """
    inner = unwrap(model)
    had_own = "forward" in vars(inner)  # accelerate's autocast wrapper is an instance attribute
    original = inner.forward

    def restore() -> None:
        if had_own:
            inner.forward = original
        else:
            vars(inner).pop("forward", None)

    def forward(*inputs: Any) -> Any:
        restore()  # function itself may call the real forward
        return function(*inputs)

    inner.forward = forward
    try:
        return model(*args)
    finally:
        restore()


def hidden_states(model: nn.Module, batch: Batch) -> Float[Tensor, "B T D"]:
    """The last hidden states, after the final norm: what the LM head reads. ``model`` may be wrapped by PEFT."""
    # A cache, or a mask beside restarting positions, would let packed documents see each other.
    return (
        causal_lm(model)
        .base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        )
        .last_hidden_state
    )


def head_of(model: nn.Module, vocab: int | None = None) -> Head:
    """The model's LM head, cut to the first ``vocab`` classes."""
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(lm.get_output_embeddings(), float(scale), softcap, vocab)


def vocab_rows(model: nn.Module) -> int:
    """How many classes the head has, padding included."""
    return causal_lm(model).config.get_text_config().vocab_size


@torch.no_grad()
def check_head(model: nn.Module, packed: bool) -> None:
    """Compare head and packing with the model's own forward on a few tokens, before anything trains on them.

    Raises:
        ValueError: the architecture changes its logits in a way that :func:`head_of` does not know, or (``packed``)
            lets packed documents see each other.
    """
    lm = causal_lm(model)
    name, was_training = type(lm).__name__, lm.training
    lm.eval()
    ids = torch.arange(8, device=lm.device)[None].repeat(2, 2) % vocab_rows(lm)
    positions = torch.arange(8, device=lm.device).repeat(2, 2)
    hidden = hidden_states(lm, _probe(ids, positions))
    ours = head_of(lm)(hidden[0])
    theirs = lm(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
    difference = float((ours - theirs).abs().max())
    # In half precision the model scales rounded logits and sekd exact ones: far less than 3 % of the largest.
    if not difference <= 0.03 * theirs.abs().max():
        raise ValueError(
            f"the logits of {name} are not those of its LM head with the scaling that sekd knows (logit_scale, "
            f"logits_scaling, final_logit_softcapping); they differ by {difference:.3g}"
        )
    # What comes second must not change by a bit when what comes first does.
    ids[:, :8] = ids[:, :8].flip(1)
    if packed and not torch.equal(hidden_states(lm, _probe(ids, positions))[:, 8:], hidden[:, 8:]):
        raise ValueError(
            f"{name} with attention {lm.config._attn_implementation!r} lets packed documents see each other; "
            "use attn_implementation: sdpa, or packing: false"
        )
    lm.train(was_training)


def check_head_columns(model: nn.Module, args: SEKDConfig) -> None:
    """Raise ValueError if a sampled softmax could not read single columns of the student's head."""
    projection = head_of(model).projection
    if args.sampled_softmax and type(projection) is not nn.Linear:
        raise ValueError(
            f"sampled_softmax reads single classes of the student's head, which is a {type(projection).__name__}: "
            "leave lm_head out of lora_target_modules, or set sampled_softmax: 0"
        )


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of every weight's name, shape and up to 1,024 of its values, in float32: tells models apart quickly."""
    digest = hashlib.sha256()
    for name, tensor in causal_lm(model).state_dict().items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // 1024)].float().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary and the chat template."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _probe(ids: Tensor, positions: Tensor) -> Batch:
    return Batch(ids, targets=ids, position_ids=positions, sample_ids=ids[:, 0])


def common_vocab(student: nn.Module, teacher: nn.Module) -> int:
    """Classes in both heads. Equal tokenizers may be padded differently (Qwen2.5: 151,936 and 152,064 rows)."""
    return min(vocab_rows(student), vocab_rows(teacher))


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """The model as a teacher: no gradients, no dropout."""
    return model.eval().requires_grad_(False)


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The student's weights under their checkpoint names, one whole tensor at a time: shards gathered, adapters
    merged into copies. The training weights themselves are never touched, so that nothing drifts.

    Under FSDP2 every rank must consume the whole iterator.
    """
    lm = causal_lm(model)
    layers = {name: layer for name, layer in lm.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in layers.items():
        merged = copy.deepcopy(layer)  # one layer at a time; merging itself knows DoRA, biases and embeddings
        merged.merge()
        for leaf, tensor in merged.get_base_layer().state_dict().items():
            yield f"{name}.{leaf}", _whole(tensor)
    for name, tensor in lm.state_dict().items():
        if ".original_module." in name or any(name.startswith(f"{layer}.") for layer in layers):
            continue
        yield name.replace(".modules_to_save.default", ""), _whole(tensor)


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights that a LoRA student's adapter is for, as its checkpoint has them: one that is input and output
    embedding once, under the first name, which is the one that vLLM loads."""
    seen = set()
    for name, tensor in causal_lm(model).state_dict(keep_vars=True).items():
        if ".lora_" not in name and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name.replace(".base_layer.", "."), _whole(tensor)


SERVED_LORA = (
    {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    | {"task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"}
)
"""Fields of a LoraConfig that vLLM reads as PEFT does, or that change no result; others must have their defaults."""


def adapter_of(model: nn.Module) -> Adapter | None:
    """The student's adapter alone, whole tensors of it, if it is one that vLLM can apply: plain LoRA of linear layers
    before the head. Without one, engines take :func:`full_weights`.

    Under FSDP2 every rank must call it.
    """
    inner: Any = unwrap(model)
    configs = getattr(inner, "peft_config", {})
    if [*configs] != ["default"] or type(configs["default"]) is not LoraConfig:
        return None
    found, plain = configs["default"].to_dict(), LoraConfig().to_dict()
    if found["init_lora_weights"] in (False, "gaussian"):  # other ways to start may change the base weights
        found["init_lora_weights"] = True
    if any(found[name] != plain[name] for name in plain.keys() - SERVED_LORA):
        return None
    layers = {n: m for n, m in causal_lm(model).named_modules() if isinstance(m, BaseTunerLayer)}
    if any("lm_head" in n or not isinstance(m.get_base_layer(), nn.Linear) for n, m in layers.items()):
        return None
    if not all(map(_is_as_configured, layers.values())):
        return None
    if any(parameter.requires_grad and "lora_" not in name for name, parameter in inner.named_parameters()):
        return None  # what is below the adapter changes too
    found |= {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
    found |= {name: sorted(value) for name, value in found.items() if isinstance(value, set)}
    weights = get_peft_model_state_dict(inner, save_embedding_layers=False)
    return Adapter(found, {name: _whole(tensor) for name, tensor in weights.items()})


def _is_as_configured(layer: Any) -> bool:
    """Whether a LoRA layer does what its configuration says: not merged, switched off or scaled by hand."""
    rank, alpha = layer.r["default"], layer.lora_alpha["default"]
    plain = alpha / (math.sqrt(rank) if layer.use_rslora.get("default", False) else rank)
    on = layer.active_adapters == ["default"] and not layer.merged and not layer.disable_adapters
    return on and math.isclose(layer.scaling["default"], plain)


def check_mergeable(model: nn.Module) -> None:
    """Raise ValueError for an adapter whose merged weights no checkpoint of the student's architecture can hold."""
    lm = causal_lm(model)
    adapted = [n for n, m in lm.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    tied = {"embed_tokens", "lm_head"} & {name.rpartition(".")[2] for name in adapted}
    if any(name.endswith("token_adapter") for name in adapted):
        raise ValueError("trainable_token_indices cannot be sent to a rollout engine; use rollout_engine: hf")
    if tied and lm.config.get_text_config().tie_word_embeddings:
        raise ValueError(
            f"the adapter changes {' and '.join(sorted(tied))}, but this student has one weight for input and output, "
            "so no engine could take the merged result; leave them out of lora_target_modules and "
            "lora_modules_to_save, or use rollout_engine: hf"
        )


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
