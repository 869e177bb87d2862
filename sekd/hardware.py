"""What this machine's hardware computes well."""

import torch


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype for sums over many batches: float64, or float32 on a device that lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


def computes_in_bf16(on_cpu: bool) -> bool:
    """Whether this hardware computes in bf16 natively. If it only emulates bf16, float32 is faster."""
    if on_cpu:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 8
