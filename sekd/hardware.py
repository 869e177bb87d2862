"""What this machine's hardware computes well."""

import functools
import time
from dataclasses import dataclass

import torch


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype for sums over many batches: float64, or float32 on a device that lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


def choose_dtype(on_cpu: bool) -> str:
    """The faster of bfloat16 and float32: hardware that only emulates bf16 is slower with it."""
    if on_cpu:
        is_native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        is_native = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 8
    return "bfloat16" if is_native else "float32"


@dataclass(frozen=True)
class Rates:
    """FLOPs and bytes a second."""

    flops: float
    bytes: float


@functools.cache
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """What a device does in a large matrix product and in a copy, the best of three.

    On a CPU it takes a fifth of a second, and uses the threads that torch has.
    """
    size, copied = (8192, 2**28) if device.type == "cuda" else (1024, 2**23)
    factor, numbers = torch.ones(size, size, dtype=dtype, device=device), torch.ones(copied, device=device)
    product, copy = torch.empty_like(factor), torch.empty_like(numbers)
    best = [float("inf")] * 2
    for _ in range(4):  # the first one warms up
        for place, work in enumerate((lambda: torch.mm(factor, factor, out=product), lambda: copy.copy_(numbers))):
            _wait(device)
            started = time.perf_counter()
            work()
            _wait(device)
            best[place] = min(best[place], time.perf_counter() - started)
    return Rates(2 * size**3 / best[0], 2 * numbers.nbytes / best[1])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
