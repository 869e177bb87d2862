"""Rows through an LM head in bounded memory: [N D] becomes [N V] only a chunk at a time, in both directions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from sekd.distributions import entropy

CACHED_ROWS = 64
"""Rows whose logits about fit a CPU's caches: such chunks take about 0.6 of the time of 256 rows."""


@dataclass(frozen=True)
class Head:
    """What a causal language model does between its last hidden state and its logits, as a function of rows.

    ``projection`` is called as a module, never by its weight, so that the hooks of LoRA and FSDP run.
    ``scale`` multiplies (Cohere; Granite divides), ``softcap`` bounds by cap * tanh(z / cap) (Gemma 2), and ``vocab``
    keeps the classes that teacher and student share.
    """

    projection: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    vocab: int | None = None

    @property
    def classes(self) -> int:
        """V: how many logits it gives."""
        projection: Any = self.projection
        return self.vocab or projection.out_features

    def __call__(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits in float32."""
        return self.finish(self.project(hidden))

    def project(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """The linear layer alone, in its own type; :meth:`finish` makes logits of what it gives."""
        return self.projection(hidden)[:, : self.vocab]

    def in_autocast_dtype(self) -> "Head":
        """The same head with its weight converted to autocast's type now, and not again for each chunk of rows.

        Only a plain linear layer is: one that hooks or wrappers know about is called as it is.
        """
        linear = self.projection
        if not _is_plain(linear) or not torch.is_autocast_enabled(linear.weight.device.type):
            return self
        dtype = torch.get_autocast_dtype(linear.weight.device.type)
        return self if linear.weight.dtype == dtype else replace(self, projection=_Converted(linear, dtype))

    def finish(self, logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
        """What comes after the projection, which is the same for each class: float32, scale and soft cap."""
        logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    return type(layer) is nn.Linear and not hooked and not isinstance(layer.weight, DTensor)


class _Converted(nn.Module):
    """A linear layer that computes in another type, and whose weight's gradient is added up in the weight's own."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        # Not registered: they are the model's, and this lives for one batch.
        self.__dict__.update(weight=linear.weight, bias=linear.bias, out_features=linear.out_features)
        self.__dict__["low"] = linear.weight.detach().to(dtype)

    def forward(self, rows: Tensor) -> Tensor:
        return _LowPrecisionLinear.apply(rows, self.weight, self.bias, self.low)


class _LowPrecisionLinear(torch.autograd.Function):
    """As autocast's linear, forward and backward, on a weight that is converted already."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor) -> Tensor:
        rows_low = rows.to(low.dtype)
        ctx.save_for_backward(rows_low, low)
        ctx.types = rows.dtype, weight.dtype
        return nn.functional.linear(rows_low, low, None if bias is None else bias.to(low.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (rows, low), (rows_type, weight_type) = gradients, ctx.saved_tensors, ctx.types
        of_rows, of_weight, of_bias, _ = ctx.needs_input_grad
        return (
            (gradient @ low).to(rows_type) if of_rows else None,
            (gradient.T @ rows).to(weight_type) if of_weight else None,
            gradient.sum(0).to(weight_type) if of_bias else None,
            None,
        )


def in_chunks(
    function: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...], chunk_rows: int
) -> tuple[Tensor, ...]:
    """``function`` of N rows, computed ``chunk_rows`` at a time: at most one chunk's logits are alive.

    ``rows`` are tensors of N rows; ``function`` maps a chunk of each to tensors of as many rows, which are joined.
    With gradients, the logits of each chunk are computed again in the backward pass rather than kept; rows that fit
    into one chunk are kept, since that is as bounded and saves the second computation. No rows make one empty chunk,
    so that every parameter takes part in the graph (DDP waits for each).
    """
    keep = torch.is_grad_enabled() and len(rows[0]) <= chunk_rows
    if torch.is_grad_enabled() and not keep:
        function = partial(checkpoint, function, use_reentrant=False)
    if rows[0].device.type == "cpu" and not keep:
        chunk_rows = min(chunk_rows, CACHED_ROWS)
    with _autocast_without_cache(rows[0].device.type):
        chunks = [function(*chunk) for chunk in zip(*(r.split(chunk_rows) for r in rows), strict=True)]
    return tuple(torch.cat(column) for column in zip(*chunks, strict=True))


@torch.no_grad()
def chunked_entropy(
    hidden: Float[Tensor, "N D"], head: Callable[[Tensor], Tensor], chunk_rows: int = 256
) -> Float[Tensor, " N"]:
    """H of each row's next-token distribution, in nats, without a graph and without [N V] (arXiv 2602.01395, §4)."""
    return in_chunks(lambda h: (entropy(head(h).float().log_softmax(-1)),), (hidden,), chunk_rows)[0]


def _autocast_without_cache(device_type: str) -> torch.autocast:
    """The autocast state in force, less its cache of converted weights.

    Chunks that share one cached bf16 copy of a weight add up their gradients in bf16; each converting its own adds
    them up in the weight's float32.
    """
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )
