"""A loss over the positions of an LM head, with its gradient taken in the forward pass.

The weights of the positions are known before the loss. So the gradient of a chunk's logits is known as soon as the
logits are. It becomes gradients of the hidden states and of the head at once, and the logits are dropped. Nothing is
computed twice. The plain way to the same value and gradient is the sum of :func:`sekd.heads.in_chunks`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sekd.heads import (
    CLASS_BLOCK,
    CPU_ROWS,
    Head,
    LinearWeights,
    autocast_without_cache,
    count_product_rows,
    in_chunks,
)
from sekd.types import PerPosition


def loss_in_chunks(
    function: Callable[..., tuple[Tensor, ...]],
    head: Head,
    hidden: Float[Tensor, "N D"],
    parts: Sequence[Tensor | PerPosition],
    chunk_rows: int,
) -> tuple[Tensor, ...]:
    """``function(logits, *parts) -> (loss [], *columns [N])`` over N positions, ``chunk_rows`` at a time.

    Returns the sum of the losses, with a graph, and the joined columns, without one. At most one chunk's logits are in
    memory, and one tensor of the size of each weight of the head. ``backward`` works once. With zero positions one
    empty chunk still runs: every parameter must be in the graph, because DDP waits for all of them.
    """
    device = hidden.device.type
    is_float16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    if is_float16 or not torch.is_grad_enabled():
        # In float16 small gradients vanish unless the loss is scaled, and the scale is not known yet.
        chunks = in_chunks(lambda h, *p: _as_columns(function(head(h), *p)), [hidden, *parts], chunk_rows)
        return chunks[0].sum(), *(column.detach() for column in chunks[1:])
    at_once = chunk_rows
    if device == "cpu":
        chunk_rows, at_once = min(chunk_rows, count_product_rows(hidden)), CPU_ROWS
    linear = head.linear()
    gradients = _ModuleGradients(head, hidden) if linear is None else _LinearGradients(linear, head, hidden)
    losses, columns = [], []
    with autocast_without_cache(device), torch.enable_grad():
        split = [part.split(chunk_rows) for part in (hidden.detach(), *parts)]
        for rows, *chunk in zip(*split, strict=True):
            projected = gradients.project(rows)
            for loss, *others in _replace_by_gradient(function, head, projected, chunk, at_once):
                losses.append(loss)
                columns.append(others)
            gradients.add(projected)
            del projected  # before the next chunk's
    total = _WithGradients.apply(torch.stack(losses).sum(), gradients.collect(), *gradients.inputs)
    return total, *(torch.cat(column) for column in zip(*columns, strict=True))


def _replace_by_gradient(
    function: Callable[..., tuple[Tensor, ...]],
    head: Head,
    projected: Float[Tensor, "n V"],
    chunk: Sequence[Tensor | PerPosition],
    at_once: int,
) -> list[list[Tensor]]:
    """The results of ``function``, ``at_once`` positions at a time. The gradient takes the place of ``projected``."""
    chunk = [part if isinstance(part, Tensor) else part.compute() for part in chunk]
    results = []
    for logits, *piece in zip(*(part.split(at_once) for part in (projected, *chunk)), strict=True):
        leaf = logits.requires_grad_()
        result = function(head.finish(leaf), *piece)
        leaf.detach().copy_(torch.autograd.grad(result[0], leaf)[0])
        results.append([tensor.detach() for tensor in result])
    return results


def _as_columns(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results[0][None], *results[1:]


class _LinearGradients:
    """Gradients of a linear layer: the gradient of its weight adds up in one tensor."""

    def __init__(self, linear: LinearWeights, head: Head, hidden: Float[Tensor, "N D"]) -> None:
        self.linear, self.vocab = linear, head.vocab
        self.inputs = [t for t in (hidden, linear.weight, linear.bias) if t is not None]
        self.of_hidden: list[Tensor] = []
        self.of_weight, self.of_bias = (_make_sum(t) for t in (linear.weight, linear.bias))

    def project(self, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        with torch.no_grad():
            low, bias = self.linear.low[: self.vocab], self.linear.bias
            self.rows = rows.to(low.dtype)
            bias = None if bias is None else bias[: self.vocab].to(low.dtype)
            return torch.nn.functional.linear(self.rows, low, bias)

    @torch.no_grad()
    def add(self, gradient: Float[Tensor, "n V"]) -> None:
        low = self.linear.low[: self.vocab]
        self.of_hidden.append((gradient @ low).to(self.inputs[0].dtype))
        if self.of_weight is not None:
            whole = self.of_weight[: self.vocab]
            if low.dtype == whole.dtype:
                whole.addmm_(gradient.T, self.rows)
            else:  # bf16 products; their sum must be float32
                for block, columns in zip(whole.split(CLASS_BLOCK), gradient.split(CLASS_BLOCK, 1), strict=True):
                    block += columns.T @ self.rows
        if self.of_bias is not None:
            self.of_bias[: self.vocab] += gradient.sum(0)

    def collect(self) -> list[Tensor | None]:
        """The gradients of ``inputs``."""
        of_weights = [self.of_weight, *([] if self.linear.bias is None else [self.of_bias])]
        gradients = [torch.cat(self.of_hidden), *of_weights]
        return [g if g is None else g.to(t.dtype) for g, t in zip(gradients, self.inputs, strict=True)]


def _make_sum(weight: Tensor | None) -> Tensor | None:
    """Zeros for the gradient of a weight, at least in float32: the weight that FSDP2 gathers may be bf16."""
    if weight is None or not weight.requires_grad:
        return None
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


class _ModuleGradients:
    """Gradients of any other module: autograd's, added up over the chunks."""

    def __init__(self, head: Head, hidden: Float[Tensor, "N D"]) -> None:
        self.head = head
        self.weights = [p for p in head.projection.parameters() if p.requires_grad]
        self.inputs = [hidden, *self.weights]
        self.of_hidden: list[Tensor] = []
        self.of_weights = [torch.zeros_like(w) for w in self.weights]

    def project(self, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        self.rows = rows.requires_grad_()
        self.projected = self.head.project(self.rows)
        return self.projected.detach().clone()  # its graph may need the values

    def add(self, gradient: Float[Tensor, "n V"]) -> None:
        of_rows, *of_weights = torch.autograd.grad(
            self.projected, [self.rows, *self.weights], gradient, allow_unused=True, materialize_grads=True
        )
        self.of_hidden.append(of_rows)
        for whole, part in zip(self.of_weights, of_weights, strict=True):
            whole += part

    def collect(self) -> list[Tensor | None]:
        """The gradients of ``inputs``."""
        return [torch.cat(self.of_hidden), *self.of_weights]


class _WithGradients(torch.autograd.Function):
    """A number whose gradients are known. They are changed in place, so the backward pass works once."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.no_grad()
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this loss was used before; compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if g is None else g.mul_(outer[0]) for g in gradients)
