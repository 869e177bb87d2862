"""The order of prompts if each has several rollouts."""

import random
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class RepeatSampler(Sampler[int]):
    """Each index ``times`` times in a row, so that a step has all rollouts of a prompt. Shuffled again in each epoch.

    The order depends only on seed and epoch, so a resumed run has the same order. TRL's sampler of this name has not.
    ``get_epoch`` returns the epoch that begins. A loader's ``set_epoch`` would not do: in a resumed run of several
    processes it does not reach the sampler.
    """

    def __init__(self, length: int, times: int, seed: int, shuffle: bool, get_epoch: Callable[[], int]) -> None:
        self.length, self.times, self.seed, self.shuffle, self.get_epoch = length, times, seed, shuffle, get_epoch

    def __len__(self) -> int:
        return self.length * self.times

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{self.get_epoch()}").getrandbits(63))
        order = torch.randperm(self.length, generator=generator) if self.shuffle else torch.arange(self.length)
        yield from order.repeat_interleave(self.times).tolist()
