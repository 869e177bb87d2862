"""Load models and reach inside them. Only this module handles wrappers, adapters and heads."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.utils import extract_model_from_parallel, patch_environment
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from sekd.config import SEKDConfig
from sekd.hardware import choose_dtype
from sekd.heads import Head
from sekd.types import Batch

logger = logging.get_logger(__name__)
M = TypeVar("M", bound=nn.Module)


def load_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """A causal language model from a folder or hub id; ``kwargs`` are those of ``from_pretrained``.

    Every process loads the weights. The RAM-efficient loading of ``accelerate launch --use_fsdp`` would leave zeros in
    all processes of a machine but one, until FSDP wraps the model. sekd uses the student before that, and never wraps
    the teacher.
    """
    with patch_environment(fsdp_cpu_ram_efficient_loading=False):
        return AutoModelForCausalLM.from_pretrained(name, **kwargs)


def load_teacher(
    name: str, args: SEKDConfig, attention: str | None = None, device: torch.device | None = None
) -> PreTrainedModel:
    """The teacher ``name`` from a folder or hub id, in the revision, dtype and bits of ``args``.

    Quantized weights are on ``device``, by default on :func:`find_teacher_device`. Others are in the CPU's memory.
    """
    # With a teacher_cache no dtype is chosen before, since only `sekd cache build` loads the teacher.
    dtype, revision = args.teacher_dtype or choose_dtype(args.use_cpu), args.teacher_model_revision
    options: dict[str, Any] = {}
    if args.teacher_load_in_4bit or args.teacher_load_in_8bit:
        computed_in = choose_dtype(args.use_cpu) if dtype == "auto" else dtype
        options = quantize(args.teacher_load_in_4bit, computed_in, device or find_teacher_device(args))
    return load_model(name, revision=revision, dtype=dtype, attn_implementation=attention, **options)


def quantize(in_4bit: bool, dtype: str | torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a teacher on ``device`` in 4 bits (NF4), or else in 8. Its head is whole.

    4-bit weights are multiplied in ``dtype``.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=in_4bit,
        load_in_8bit=not in_4bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    return {"device_map": {"": device}, "quantization_config": config}


def find_teacher_device(args: SEKDConfig) -> torch.device:
    """The teacher's own device, or else the student's."""
    return torch.device(args.teacher_device or args.device)


def place_teacher(teacher: M, device: torch.device) -> M:
    """Freeze a teacher, and move it to its device."""
    return freeze(teacher).to(device)


def shard_teacher(teacher: nn.Module, args: SEKDConfig) -> None:
    """Shard a frozen teacher's layers over the processes of each machine (FSDP2). Every process calls this.

    A layer is whole on a device only while it runs. The embeddings and the head stay whole everywhere: the head runs
    over as many chunks as a process has, and processes can gather weights only together.
    """
    lm = causal_lm(teacher)
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE") or args.world_size)
    machines = args.world_size // on_machine
    mesh = init_device_mesh(args.device.type, (machines, on_machine), mesh_dim_names=("machines", "processes"))
    whole = {*lm.get_input_embeddings().parameters(), *lm.get_output_embeddings().parameters()}
    layers = [module for module in lm.modules() if type(module).__name__ in (lm._no_split_modules or ())]
    for module in (*layers, lm.base_model):
        fully_shard(module, mesh=mesh["processes"], reshard_after_forward=True, ignored_params=whole)


def compute_dtype(args: SEKDConfig) -> torch.dtype:
    """What the student computes in, and so its copy in a rollout engine: bf16, fp16 or float32."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def log_dtypes(student: nn.Module, teacher: nn.Module | None, args: SEKDConfig, generates: bool) -> None:
    """Log once what was chosen for the student, the teacher and (``generates``) the rollouts."""
    computes = str(compute_dtype(args)).removeprefix("torch.")
    names = ["cache" if model is None else _name_precision(causal_lm(model)) for model in (student, teacher)]
    line = f"precision: student {names[0]} weights, computing in {computes}; teacher {names[1]}"
    if args.process_index == 0:
        logger.warning(line + f"; rollouts {computes}" * generates)


def _name_precision(model: Any) -> str:
    for bits in (4, 8):
        if getattr(model, f"is_loaded_in_{bits}bit", False):
            return f"{bits}-bit"
    return str(model.dtype).removeprefix("torch.")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP, FSDP and DeepSpeed; a PEFT model stays wrapped by PEFT."""
    return extract_model_from_parallel(model, keep_fp32_wrapper=True)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside every wrapper, with its LoRA layers in place."""
    inner: Any = unwrap(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Take off the autocast that accelerate puts around the forward pass, which then computes in the weights' dtype."""
    inner = unwrap(model)
    wrapped = vars(inner).pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            inner.forward = wrapped


def run_inside(model: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function(*args)`` as if it were the forward of the wrapped ``model``, and return its result.

    DDP and FSDP gather weights and run hooks in the wrapper's own forward, so everything that touches parameters must
    happen there. ``function`` returns tensors, and tuples and dicts of them.

    The graph leads through the wrapper, whose hooks start the backward pass. The values do not: FSDP2 rounds what it
    returns to the dtype of mixed precision. It also rounds the gradient of the result, so ``function`` must return the
    final loss, whose gradient is 1.
    """
    inner: Any = unwrap(model)
    result: Any = None
    was_wrapped = "forward" in vars(inner)  # accelerate's autocast wrapper is an instance attribute
    original = inner.forward

    def restore() -> None:
        if was_wrapped:
            inner.forward = original
        else:
            vars(inner).pop("forward", None)

    def forward(*inputs: Any) -> list[Tensor]:
        nonlocal result
        restore()  # function itself may call the real forward
        result = function(*inputs)
        return [tensor for tensor in tree_leaves(result) if _has_graph(tensor)]

    inner.forward = forward
    try:
        passed = iter(model(*args))
    finally:
        restore()
    return tree_map(lambda v: _WithGraphOf.apply(next(passed), v.detach()) if _has_graph(v) else v, result)


def _has_graph(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


class _WithGraphOf(torch.autograd.Function):
    """The value of the second tensor; its gradient goes to the first one."""

    @staticmethod
    def forward(ctx: Any, passed: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def hidden_states(model: nn.Module, batch: Batch) -> Float[Tensor, "B T D"]:
    """The last hidden states, after the final norm: what the LM head reads. ``model`` may be wrapped by PEFT."""
    # With a key-value cache, or a mask in addition to restarting positions, packed documents would see each other.
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


def get_head(model: nn.Module, vocab: int | None = None) -> Head:
    """The model's LM head, cut to the first ``vocab`` classes."""
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(lm.get_output_embeddings(), float(scale), softcap, vocab)


def count_classes(model: nn.Module) -> int:
    """The number of classes of the head, padding included."""
    return causal_lm(model).config.get_text_config().vocab_size


@torch.no_grad()
def check_head(model: nn.Module, packed: bool) -> None:
    """Check :func:`get_head` and packing on a few tokens, before anything trains.

    The head must give the model's own logits, and these must tell classes apart. Packed documents must not see each
    other.

    Raises:
        ValueError: all logits are equal; the architecture changes its logits in a way that :func:`get_head` does not
            support; or (``packed``) it lets packed documents see each other.
    """
    lm = causal_lm(model)
    name, was_training = type(lm).__name__, lm.training
    lm.eval()
    ids = torch.randint(count_classes(lm), (2, 16), generator=torch.Generator().manual_seed(0)).to(lm.device)
    positions = torch.arange(8, device=lm.device).repeat(2, 2)
    hidden = hidden_states(lm, _probe(ids, positions))
    logits = get_head(lm)(hidden[0])
    model_logits = lm(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
    if (model_logits == model_logits[:, :1]).all():
        raise ValueError(
            f"{name} gives every class the same logit, so its weights were never loaded (are they all 0?); load it by "
            "name, or with FSDP_CPU_RAM_EFFICIENT_LOADING=false"
        )
    difference = float((logits - model_logits).abs().max())
    # In half precision the model scales logits that are already rounded, and sekd scales exact ones. The difference
    # is far below 3 % of the largest logit.
    if not difference <= 0.03 * model_logits.abs().max():
        raise ValueError(
            f"sekd does not support {name}: its logits differ by {difference:.3g} from its LM head with logit_scale, "
            "logits_scaling and final_logit_softcapping; choose another architecture"
        )
    # The second document must not change when the first one does. The rows swap their first documents, so that each
    # expert of a mixture gets as many tokens as before. A leak is 15 % of the largest value, and rounding below 1 %.
    ids[:, :8] = ids[:, :8].flip(0)
    change = (hidden_states(lm, _probe(ids, positions)) - hidden)[:, 8:].abs().max()
    if packed and not change <= 0.01 * hidden.abs().max():
        raise ValueError(
            f"{name} with attention {lm.config._attn_implementation!r} lets packed documents see each other; "
            "use attn_implementation: sdpa, or packing: false"
        )
    lm.train(was_training)


def check_head_columns(model: nn.Module, args: SEKDConfig) -> None:
    """Raise ValueError if a sampled softmax cannot read single columns of the student's head."""
    projection = get_head(model).projection
    if args.sampled_softmax and type(projection) is not nn.Linear:
        raise ValueError(
            f"sampled_softmax reads single classes of the student's head, which is a {type(projection).__name__}: "
            "leave lm_head out of lora_target_modules, or set sampled_softmax: 0"
        )


def _probe(ids: Tensor, positions: Tensor) -> Batch:
    return Batch(ids, targets=ids, position_ids=positions, sample_ids=ids[:, 0])


def common_vocab(student: nn.Module, teacher: nn.Module) -> int:
    """The number of classes that both heads have.

    Models with the same tokenizer may be padded differently (Qwen2.5: 151,936 and 152,064 classes).
    """
    return min(count_classes(student), count_classes(teacher))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode: no dropout. It returns to its mode after the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def freeze(model: M) -> M:
    """Freeze a model: no gradients, no dropout."""
    return model.eval().requires_grad_(False)
