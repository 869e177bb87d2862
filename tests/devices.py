"""A second device that is not there: its tensors have real values, and a mix with the CPU's raises."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("meta")
"""Its name. Every other name needs a driver."""


class Elsewhere(Tensor):
    """A tensor on the second device. ``inner`` holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Elsewhere":
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=ELSEWHERE
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, dict(kwargs or {}))


class TwoDevices(TorchDispatchMode):
    """While it is on, tensors can move to ELSEWHERE and back."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, dict(kwargs or {}))


def _run(function: Any, args: Any, kwargs: dict) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    places = {isinstance(tensor, Elsewhere) for tensor in tensors if tensor.dim()}  # a number may come from the CPU
    device = kwargs.pop("device", None)
    if len(places) > 1:
        raise RuntimeError(f"{function}: expected all tensors to be on the same device")
    inner_args, inner_kwargs = tree_map(lambda v: v.inner if isinstance(v, Elsewhere) else v, (args, kwargs))
    result = function(*inner_args, **inner_kwargs)
    if device != ELSEWHERE if device else not any(isinstance(tensor, Elsewhere) for tensor in tensors):
        return result
    return tree_map(lambda v: Elsewhere(v) if isinstance(v, Tensor) and not isinstance(v, Elsewhere) else v, result)
