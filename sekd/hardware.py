"""What this machine's hardware computes well."""

import functools
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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
    """What a device does in a large matrix product and in a large copy, in a fraction of a second.

    A product is as large as the device does in a few milliseconds, since longer ones never have a busy machine for
    themselves.
    """
    seconds, size = 0.0, 256
    while seconds < 2e-3 and size < 8192:
        size *= 2
        # A GPU multiplies equal numbers faster. Random ones would move the generator that training draws from.
        factor = torch.arange(size**2, device=device, dtype=torch.float32).sin().view(size, size).to(dtype)
        seconds = _time_best(partial(torch.mm, factor, factor, out=torch.empty_like(factor)), 20, device)
    numbers = torch.ones(2**26 if device.type == "cuda" else 2**23, device=device)  # more than caches hold
    copying = _time_best(partial(torch.empty_like(numbers).copy_, numbers), 5, device)
    return Rates(2 * size**3 / seconds, 2 * numbers.nbytes / copying)


def _time_best(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds, the least of several times. The first one warms up."""
    best = float("inf")
    for _ in range(times):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure_memory() -> int:
    """The most bytes that this process had at once: allocated on its GPU if it used one, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
