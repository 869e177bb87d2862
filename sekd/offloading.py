"""Activations of the student's backbone in the CPU's memory between its forward and its backward pass."""

from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from sekd.models import causal_lm

SMALLEST = 1024
"""Tensors with fewer elements stay."""


class OffloadActivations(saved_tensors_hooks):
    """In this context, tensors that autograd keeps move to the CPU's memory, and return in the backward pass.

    Weights of ``model`` and small tensors stay. Moving and computing share one stream.
    """

    def __init__(self, model: nn.Module) -> None:
        moving = save_on_cpu(pin_memory=True)
        self.weights: set[int] = set()
        self.model = model

        def pack(tensor: Tensor) -> Any:
            if tensor.numel() < SMALLEST or tensor.untyped_storage().data_ptr() in self.weights:
                return tensor
            return moving.pack_hook(tensor)

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else moving.unpack_hook(packed)

        super().__init__(pack, unpack)

    def __enter__(self) -> None:
        # The Trainer moves the weights to their device after the hooks are there.
        self.weights = {weight.untyped_storage().data_ptr() for weight in self.model.parameters()}
        super().__enter__()


def offload_activations(model: nn.Module) -> None:
    """Let each forward pass of the student's backbone move its activations to the CPU's memory.

    The head has hardly any (:mod:`sekd.head_loss`). With gradient checkpointing, only the inputs of the layers move.
    """
    offloading = OffloadActivations(model)
    backbone = causal_lm(model).base_model
    backbone.register_forward_pre_hook(lambda *_: offloading.__enter__())
    backbone.register_forward_hook(lambda *_: offloading.__exit__(None, None, None), always_call=True)
