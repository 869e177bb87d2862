"""Samples become a batch of tokens: the only place where targets are shifted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rollouts import Rollout
from sekd.types import IGNORE


@dataclass(slots=True)
class Sample:
    """One training sequence. ``supervised`` marks the tokens that are targets; ``seq_lengths`` the packed documents.

    ``teacher_prompt_ids`` is what the teacher reads in the place of the prompt, if that is something else;
    ``entropies`` are those of the distributions that a rollout's completion was drawn from, one a token.
    """

    input_ids: list[int]
    supervised: list[int]
    sample_id: int
    prompt_length: int = 0
    seq_lengths: list[int] | None = None
    teacher_prompt_ids: list[int] | None = None
    entropies: list[float] | None = None


def collate(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Tensor]:
    """The fields of :class:`sekd.types.Batch`, padded on the right; the teacher's own where a sample has a prompt for
    it, with as many targets in the same order."""
    batch = _padded(samples, pad_token_id)
    if any(sample.teacher_prompt_ids is not None for sample in samples):
        theirs = _padded([*map(_as_the_teacher_reads, samples)], pad_token_id)
        batch |= {f"teacher_{name}": grid for name, grid in theirs.items()}
    if all(sample.entropies is not None for sample in samples):
        entropy = torch.zeros(batch["targets"].shape)
        for row, sample in zip(entropy, samples, strict=True):
            row[sample.prompt_length : len(sample.input_ids)] = torch.tensor(sample.entropies)
        batch["student_entropy"] = entropy.roll(-1, dims=1)  # a token was drawn from the row before it
    return {**batch, "sample_ids": torch.tensor([s.sample_id for s in samples])}


def _padded(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Tensor]:
    """Row t gets token t + 1 as its target where that token is supervised and does not begin a document."""
    width = max(len(s.input_ids) for s in samples)
    input_ids = torch.full((len(samples), width), pad_token_id)
    supervised = torch.zeros(len(samples), width, dtype=torch.bool)
    position_ids = torch.empty(len(samples), width, dtype=torch.long)
    for b, sample in enumerate(samples):
        length = len(sample.input_ids)
        input_ids[b, :length] = torch.tensor(sample.input_ids)
        supervised[b, :length] = torch.tensor(sample.supervised, dtype=torch.bool)
        *lengths, last = sample.seq_lengths or [length]
        # Padding continues the last document: what comes later is never attended to, and needs no mask.
        position_ids[b] = torch.cat([torch.arange(n) for n in (*lengths, last + width - length)])
    targets = torch.full_like(input_ids, IGNORE)
    is_target = supervised[:, 1:] & (position_ids[:, 1:] > 0)
    targets[:, :-1] = torch.where(is_target, input_ids[:, 1:], IGNORE)
    return {"input_ids": input_ids, "targets": targets, "position_ids": position_ids}


def _as_the_teacher_reads(sample: Sample) -> Sample:
    """The same completion behind the teacher's prompt."""
    prompt, behind = sample.teacher_prompt_ids, sample.prompt_length
    if prompt is None:
        return sample
    supervised = [0, *sample.supervised[1:]]  # without a prompt, the student has no row for its first token
    return replace(
        sample,
        input_ids=[*prompt, *sample.input_ids[behind:]],
        supervised=[0] * len(prompt) + supervised[behind:],
        prompt_length=len(prompt),
    )


def from_rollout(sample: Sample, rollout: Rollout, entropies: list[float] | None = None) -> Sample:
    """The sample with a generated completion in the place of its own; only what was generated is supervised."""
    ids = [*rollout.prompt_ids, *rollout.completion_ids]
    supervised = [0] * len(rollout.prompt_ids) + [1] * len(rollout.completion_ids)
    theirs = sample.teacher_prompt_ids
    length = len(rollout.prompt_ids)
    return Sample(ids, supervised, sample.sample_id, length, teacher_prompt_ids=theirs, entropies=entropies)
