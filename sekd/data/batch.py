"""Collate samples into a batch of tokens. Targets are shifted here, and nowhere else.

B sequences, T tokens, as in :mod:`sekd.types`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from rollouts import Rollout
from sekd.types import IGNORE


@dataclass(slots=True)
class Sample:
    """One training sequence: its tokens, its mask of targets, and its number in the dataset.

    ``supervised`` is 1 for each token that is a target, and 0 for the others. ``prompt_length`` counts the tokens of
    the prompt. ``seq_lengths`` are the lengths of the packed documents. The teacher reads ``teacher_prompt_ids`` in
    place of the prompt, unless they are None. ``entropies`` belong to a rollout: for each token of the completion, the
    entropy in nats of the distribution that it was sampled from.
    """

    input_ids: list[int]
    supervised: list[int]
    sample_id: int
    prompt_length: int = 0
    seq_lengths: list[int] | None = None
    teacher_prompt_ids: list[int] | None = None
    entropies: list[float] | None = None


def group_by_length(micro_batches: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
    """The same samples in micro-batches of the same sizes. Samples of similar length share one: little is padded.

    The longest come first: memory runs out in the first micro-batch, if at all. Samples of a micro-batch keep their
    order.
    """
    samples = [sample for micro_batch in micro_batches for sample in micro_batch]
    longest_first = iter(sorted(range(len(samples)), key=lambda i: -len(samples[i].input_ids)))
    return [[samples[i] for i in sorted(islice(longest_first, len(part)))] for part in micro_batches]


def collate(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Tensor]:
    """The samples as the fields of :class:`sekd.types.Batch`, [B T], padded on the right.

    If a sample has a prompt for the teacher, the batch has the teacher's fields too, [B T2]. Each sequence has the same
    targets in both, in the same order.
    """
    batch = _pad(samples, pad_token_id)
    if any(sample.teacher_prompt_ids is not None for sample in samples):
        teacher_batch = _pad([*map(_replace_prompt, samples)], pad_token_id)
        batch |= {f"teacher_{name}": grid for name, grid in teacher_batch.items()}
    if all(sample.entropies is not None for sample in samples):
        entropy = torch.zeros(batch["targets"].shape)
        for sequence, sample in zip(entropy, samples, strict=True):
            sequence[sample.prompt_length : len(sample.input_ids)] = torch.tensor(sample.entropies)
        batch["student_entropy"] = entropy.roll(-1, dims=1)  # the distribution of a token is at the position before it
    return {**batch, "sample_ids": torch.tensor([s.sample_id for s in samples])}


def _pad(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Tensor]:
    """Pad the tokens and shift the targets.

    The target of position t is token t + 1, if that token is supervised and is not the first of a document.
    """
    width = max(len(s.input_ids) for s in samples)
    input_ids = torch.full((len(samples), width), pad_token_id)
    supervised = torch.zeros(len(samples), width, dtype=torch.bool)
    position_ids = torch.empty(len(samples), width, dtype=torch.long)
    for b, sample in enumerate(samples):
        length = len(sample.input_ids)
        input_ids[b, :length] = torch.tensor(sample.input_ids)
        supervised[b, :length] = torch.tensor(sample.supervised, dtype=torch.bool)
        *lengths, last = sample.seq_lengths or [length]
        # Padding continues the last document. It needs no mask, since attention is causal and padding comes last.
        position_ids[b] = torch.cat([torch.arange(n) for n in (*lengths, last + width - length)])
    targets = torch.full_like(input_ids, IGNORE)
    is_target = supervised[:, 1:] & (position_ids[:, 1:] > 0)
    targets[:, :-1] = torch.where(is_target, input_ids[:, 1:], IGNORE)
    return {"input_ids": input_ids, "targets": targets, "position_ids": position_ids}


def _replace_prompt(sample: Sample) -> Sample:
    """The same completion after the teacher's prompt, if the sample has one."""
    prompt, start = sample.teacher_prompt_ids, sample.prompt_length
    if prompt is None:
        return sample
    supervised = [0, *sample.supervised[1:]]  # without a prompt, no position of the student predicts the first token
    return replace(
        sample,
        input_ids=[*prompt, *sample.input_ids[start:]],
        supervised=[0] * len(prompt) + supervised[start:],
        prompt_length=len(prompt),
    )


def from_rollout(sample: Sample, rollout: Rollout, entropies: list[float] | None = None) -> Sample:
    """The sample with the rollout's completion instead of its own. Only the generated tokens are supervised."""
    return Sample(
        input_ids=[*rollout.prompt_ids, *rollout.completion_ids],
        supervised=[0] * len(rollout.prompt_ids) + [1] * len(rollout.completion_ids),
        sample_id=sample.sample_id,
        prompt_length=len(rollout.prompt_ids),
        teacher_prompt_ids=sample.teacher_prompt_ids,
        entropies=entropies,
    )
