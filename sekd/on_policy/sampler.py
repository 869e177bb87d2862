"""The order of prompts that have several rollouts."""

import random
from collections.abc import Iterator

import torch
from datasets import IterableDataset
from torch.utils.data import Sampler


class RepeatSampler(Sampler[int]):
    """Each index ``times`` times in a row, so that rollouts of a prompt meet in a step; shuffled anew each epoch.

    The order is the epoch's own, so that a resumed run finds it again, which TRL's sampler of this name cannot.
    """

    def __init__(self, length: int, times: int, seed: int, shuffle: bool = True) -> None:
        self.length, self.times, self.seed, self.shuffle, self.epoch = length, times, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length * self.times

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{self.epoch}").getrandbits(63))
        order = torch.randperm(self.length, generator=generator) if self.shuffle else torch.arange(self.length)
        yield from order.repeat_interleave(self.times).tolist()


def repeated(stream: IterableDataset, times: int) -> IterableDataset:
    """As :class:`RepeatSampler`, for a stream, which no sampler reads."""
    return stream.map(lambda rows: {name: [v for v in rows[name] for _ in range(times)] for name in rows}, batched=True)
