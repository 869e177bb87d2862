"""Tests on another device: a GPU, or ELSEWHERE, whose tensors have values and raise where they meet the CPU's."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

import sekd

PACKAGE = Path(sekd.__file__).parent


class _Backend(_DummyBackendModule):
    """What torch asks about the device. It is there while TwoDevices is on."""

    is_there: ClassVar[bool] = False

    def is_available(self) -> bool:
        return self.is_there

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any) -> None:
        torch.set_rng_state(state)


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _Backend.is_there


_setup_privateuseone_for_python_backend("elsewhere", _Backend(), _Hook())

ELSEWHERE = torch.device("elsewhere:0")

AUTOCAST = torch._C.DispatchKey.AutocastPrivateUse1
_any_operation, _products = (torch.library.Library(name, "IMPL", AUTOCAST.name) for name in ("_", "aten"))
_any_operation.fallback(torch.library.fallthrough_kernel)


def _in_low_precision(name: str, *args: Any, **kwargs: Any) -> Any:
    dtype = torch.get_autocast_dtype(ELSEWHERE.type)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(AUTOCAST)):
        args = tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, args)
        return getattr(torch.ops.aten, name)(*args, **kwargs)


for _name in ("linear", "matmul", "mm", "addmm", "bmm", "scaled_dot_product_attention"):
    _products.impl(_name, partial(_in_low_precision, _name))


needs_kernels = pytest.mark.skipif(
    os.environ.get("SEKD_TEST_DEVICE") == "elsewhere", reason="elsewhere, operations consist of others"
)
"""For tests that count operations or the sizes of their results, or give a parameter other data."""


class Elsewhere(Tensor):
    """A tensor on ELSEWHERE. ``inner`` holds its values on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

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


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, dict(kwargs or {}))


class TwoDevices(TorchFunctionMode):
    """While it is on, tensors can move to ELSEWHERE and back.

    An operation on tensors of both devices raises, and so does a CPU's generator for a tensor on ELSEWHERE. It is a
    little stricter than CUDA, which takes indices from the CPU.
    """

    def __enter__(self) -> "TwoDevices":
        _Backend.is_there, self.operations = True, _Operations()
        torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to would leave ``inner`` as it was
        self.operations.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.operations.__exit__(*error)
        torch.__future__.set_swap_module_params_on_conversion(False)
        _Backend.is_there = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is Tensor.tolist:  # torch has none for subclasses
            return args[0].cpu().tolist()
        if function in (torch.tensor, torch.as_tensor) and _is_elsewhere(kwargs.get("device")):
            return function(*args, **kwargs | {"device": "cpu"}).to(ELSEWHERE)  # torch would ask the missing driver
        if function is Tensor.new_tensor and isinstance(args[0], Elsewhere):
            return args[0].inner.new_tensor(*args[1:], **kwargs).to(ELSEWHERE)
        return function(*args, **kwargs)


class MadeOn(TorchFunctionMode):
    """Tensors are made on ``device`` if the call names none. sekd's own are where sekd makes them.

    So a tensor that sekd forgets to move is on the wrong device. Random numbers are the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        made = function(*args, **kwargs)
        is_ours = Path(sys._getframe(1).f_code.co_filename).is_relative_to(PACKAGE)
        if is_ours or function not in _device_constructors() or kwargs.get("device") is not None:
            return made
        return made.detach().to(self.device).requires_grad_(made.requires_grad)


def _is_elsewhere(device: Any) -> bool:
    return device is not None and torch.device(device).type == ELSEWHERE.type


def _run(function: Any, args: Any, kwargs: dict) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    device = kwargs.pop("device", None)
    returns_elsewhere = _is_elsewhere(device) if device else any(isinstance(tensor, Elsewhere) for tensor in tensors)
    # Operations on single elements take a number from the CPU.
    takes_numbers = torch.Tag.pointwise in function.tags or function is torch.ops.aten.index_put_.default
    places = {isinstance(t, Elsewhere) for t in tensors if t.dim() or isinstance(t, Elsewhere) or not takes_numbers}
    if len(places) > 1 and function is not torch.ops.aten.copy_.default:
        raise RuntimeError(f"{function}: expected all tensors to be on the same device")
    if returns_elsewhere and kwargs.get("generator") is not None:
        raise RuntimeError(f"{function}: expected a generator of the tensor's device")
    inner_args, inner_kwargs = tree_map(lambda v: v.inner if isinstance(v, Elsewhere) else v, (args, kwargs))
    result = function(*inner_args, **inner_kwargs)
    if not returns_elsewhere:
        return result
    return tree_map(lambda v: Elsewhere(v) if isinstance(v, Tensor) and not isinstance(v, Elsewhere) else v, result)
