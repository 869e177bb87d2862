"""What this machine's hardware computes well."""

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
