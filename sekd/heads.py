"""Run an LM head over positions in bounded memory.

The forward and the backward pass each hold the logits [N V] of one chunk only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from sekd.distributions import entropy
from sekd.types import PerPosition

CPU_CHUNK_ROWS = 64
"""Chunk size on a CPU. The logits roughly fit its caches: a pass takes about 0.6 of the time of chunks of 256."""

CLASS_BLOCK = 2048
"""Classes of the head whose gradients are converted to float32 at once: on a CPU they stay in its caches."""

CPU_ROWS = 16
"""Positions whose logits go through element-wise arithmetic at once on a CPU: they stay in its caches."""


@dataclass(frozen=True)
class LinearWeights:
    """The weights of a linear layer; ``low`` [V D] is the weight in the dtype that it computes in, without a graph."""

    weight: Tensor
    bias: Tensor | None
    low: Tensor


@dataclass(frozen=True)
class Head:
    """The step of a causal language model from its last hidden states to its logits, as a function of positions.

    Call ``projection`` as a module and do not use its weight: LoRA and FSDP act in its forward.
    ``scale`` multiplies the logits (Cohere; the inverse of Granite's divisor). ``softcap`` replaces a logit z by
    cap * tanh(z / cap) (Gemma 2). ``vocab`` is the number of classes that teacher and student share.
    """

    projection: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    vocab: int | None = None

    @property
    def classes(self) -> int:
        """V: the number of logits."""
        projection: Any = self.projection
        return self.vocab or projection.out_features

    def __call__(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits, at least in float32."""
        return self.finish(self.project(hidden))

    def project(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """The linear layer alone, in its own dtype; :meth:`finish` turns the result into logits."""
        # Accelerate puts the final norm and the head into one unit of FSDP2. The norm has gathered the unit's weights,
        # and they stay until the backward pass. The hooks of more calls in one step would free them before that.
        run = self.projection.forward if _is_gathered(self.projection) else self.projection
        return run(hidden)[:, : self.vocab]

    def in_autocast_dtype(self) -> "Head":
        """The same head with its weight converted to autocast's dtype once, instead of once for each chunk.

        Only for a plain linear layer: a layer with hooks or wrappers stays as it is.
        """
        linear = self.projection
        if not _is_plain(linear) or not torch.is_autocast_enabled(linear.weight.device.type):
            return self
        dtype = torch.get_autocast_dtype(linear.weight.device.type)
        return self if linear.weight.dtype == dtype else replace(self, projection=_Converted(linear, dtype))

    def linear(self) -> "LinearWeights | None":
        """The weights of the projection; None if it is more than a linear layer (hooks, LoRA, sharded weights)."""
        layer: Any = self.projection
        if type(layer) is _Converted:
            return LinearWeights(layer.weight, layer.bias, layer.low)
        if _is_plain(layer) or (_is_gathered(layer) and type(layer).forward is nn.Linear.forward):
            return LinearWeights(layer.weight, layer.bias, layer.weight.detach())
        return None

    def finish(self, logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
        """What follows the projection, class by class: conversion to float32 (float64 stays), scale, soft cap."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    return type(layer) is nn.Linear and not hooked and not isinstance(layer.weight, DTensor)


def _is_gathered(layer: nn.Module) -> bool:
    """Whether FSDP2 shards the layer, and all of its weights are whole now."""
    return isinstance(layer, FSDPModule) and not any(isinstance(weight, DTensor) for weight in layer.parameters())


class _Converted(nn.Module):
    """A linear layer that computes in another dtype and adds up its weight's gradient in the weight's own dtype."""

    weight: Tensor
    bias: Tensor | None
    low: Tensor

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        # Not registered: the parameters belong to the model, and this object lives for one batch.
        self.__dict__.update(weight=linear.weight, bias=linear.bias, out_features=linear.out_features)
        self.__dict__["low"] = linear.weight.detach().to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        return _LowPrecisionLinear.apply(hidden, self.weight, self.bias, self.low)


class _LowPrecisionLinear(torch.autograd.Function):
    """Autocast's linear, forward and backward, on a weight that is already converted."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor) -> Tensor:
        hidden_low = hidden.to(low.dtype)
        ctx.save_for_backward(hidden_low, low)
        ctx.dtypes = hidden.dtype, weight.dtype
        return nn.functional.linear(hidden_low, low, None if bias is None else bias.to(low.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (hidden_low, low), (hidden_dtype, weight_dtype) = gradients, ctx.saved_tensors, ctx.dtypes
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            (gradient @ low).to(hidden_dtype) if needs_hidden else None,
            (gradient.T @ hidden_low).to(weight_dtype) if needs_weight else None,
            gradient.sum(0).to(weight_dtype) if needs_bias else None,
            None,
        )


def in_chunks(
    function: Callable[..., tuple[Tensor, ...]],
    parts: Sequence[Tensor | PerPosition],
    chunk_rows: int,
    cpu_rows: int = CPU_CHUNK_ROWS,
) -> tuple[Tensor, ...]:
    """Apply ``function`` to N positions, ``chunk_rows`` at a time. At most one chunk's logits are in memory.

    ``parts`` are tensors or records of N positions. ``function`` maps a chunk of each to tensors with one entry a
    position, and these are joined. With gradients, the backward pass computes the logits of each chunk again. Logits
    that fit one chunk are kept, since memory is bounded anyway. On a CPU, chunks have at most ``cpu_rows`` positions.
    With zero positions one empty chunk still runs: every parameter must be in the graph, because DDP waits for all of
    them.
    """
    device = parts[0].device.type
    keep = torch.is_grad_enabled() and len(parts[0]) <= chunk_rows
    if torch.is_grad_enabled() and not keep:
        function = partial(checkpoint, function, use_reentrant=False)
    if device == "cpu" and not keep:
        chunk_rows = min(chunk_rows, cpu_rows)
    with autocast_without_cache(device):
        chunks = [function(*chunk) for chunk in zip(*(part.split(chunk_rows) for part in parts), strict=True)]
    return tuple(torch.cat(column) for column in zip(*chunks, strict=True))


def in_pieces(function: Callable[..., tuple[Tensor, ...]], parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``function`` of a chunk's logits, and of other tensors [n ...]; on a CPU, of ``CPU_ROWS`` positions at a time."""
    if parts[0].device.type != "cpu":
        return function(*parts)
    pieces = [function(*piece) for piece in zip(*(part.split(CPU_ROWS) for part in parts), strict=True)]
    return tuple(torch.cat(column) for column in zip(*pieces, strict=True))


def count_product_rows(hidden: Float[Tensor, "N D"]) -> int:
    """Positions of a product with a head on a CPU: 256 in bf16, and 128 in float32, whose logits are twice as large."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    return 512 // dtype.itemsize


@torch.no_grad()
def chunked_entropy(
    hidden: Float[Tensor, "N D"], head: Callable[[Tensor], Tensor], chunk_rows: int = 256
) -> Float[Tensor, " N"]:
    """H of the next-token distribution at each position, in nats, without a graph (arXiv 2602.01395, section 4)."""
    return in_chunks(lambda h: (entropy(head(h).float().log_softmax(-1)),), (hidden,), chunk_rows)[0]


def autocast_without_cache(device_type: str) -> torch.autocast:
    """The current autocast state without its cache of converted weights.

    Chunks that share one cached bf16 copy of a weight add up their gradients in bf16. If each chunk converts the
    weight itself, gradients are added up in the weight's float32.
    """
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )
