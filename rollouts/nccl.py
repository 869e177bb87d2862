"""Weights from GPU to GPU: the trainer's end of vLLM's weight-transfer API, for one server. Needs CUDA and vLLM."""

import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor


class NCCLTransfer:
    """A connection to a server that was started with ``--weight-transfer-config '{"backend": "nccl"}'``.

    NCCL needs a different GPU at each end, so the server cannot use the trainer's. After an error, or when the server
    was restarted, a new connection is needed.

    Args:
        workers: the number of the server's workers, from its ``/get_world_size``.
    """

    def __init__(self, url: str, workers: int, timeout: float) -> None:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        transfer, self.weights = self, dict[str, Tensor]()

        class Source(WeightSource):
            def metadata(self) -> list[Any]:
                return [ParamMeta(name, w.dtype, tuple(w.shape)) for name, w in transfer.weights.items()]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                return iter(transfer.weights.items())

        client = HTTPVLLMWeightSyncClient(url, timeout)
        address, port = _find_address(url)
        info = NCCLTrainerInitInfo(address, port, workers + 1, rank=0)
        self.engine = NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=Source())

    def send(self, weights: dict[str, Tensor]) -> None:
        """Replace the server's weights. ``weights`` are on the trainer's GPU, under their checkpoint names."""
        self.weights = weights
        self.engine.send_weights()


def _find_address(url: str) -> tuple[str, int]:
    """This machine's address as the server sees it, and a free port."""
    server = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((server.hostname, server.port or 80))
        address = probe.getsockname()[0]
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]
