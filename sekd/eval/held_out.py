"""How far is a student from its teacher on held-out positions?"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction

from sekd.data.batch import Sample, collate
from sekd.distributions import cross_entropy, entropy
from sekd.eval.records import BINS
from sekd.hardware import widest_float
from sekd.heads import in_chunks
from sekd.losses import forward_kl, reverse_kl
from sekd.models import get_head, hidden_states, run_inside
from sekd.teachers import Teacher
from sekd.types import IGNORE, Batch, Positions

STUDENT_MEANS = ("student_ce", "student_entropy")
TEACHER_MEANS = ("teacher_ce", "forward_kl", "reverse_kl", "top1_agreement")

SequenceSums = dict[str, Tensor]
"""Sums over the valid positions of one sequence, on the CPU; the names are those of :func:`measure_sequences`."""


@torch.no_grad()
def measure_sequences(
    student: nn.Module, teacher: Teacher, batch: Batch, vocab: int | None, chunk_rows: int
) -> tuple[dict[str, Float[Tensor, "B ..."]], Int[Tensor, "B T"]]:
    """Sums over the valid positions of each sequence, and the student's likeliest token at each position.

    The sums [B] are in nats: ``student_ce`` and ``student_entropy``, and, if the teacher has its whole distribution,
    ``teacher_ce``, ``forward_kl`` = KL(p||q), ``reverse_kl`` = KL(q||p), and ``top1_agreement``, the number of
    positions where both models' likeliest tokens are the same. ``positions`` [B] is the number of positions: divide by
    it for the mean a position. ``calibration`` [B BINS 3] has, for each bin of confidence, the number of positions,
    the sum of confidences, and how often the likeliest token is the target. The temperature is 1, whatever the training
    uses. Only the first ``vocab`` classes count. The likeliest token at an invalid position is -100.
    """
    head = get_head(student, vocab).in_autocast_dtype()

    def measure_chunk(positions: Positions) -> tuple[Tensor, ...]:
        q = head(positions.hidden).log_softmax(-1)
        confidence, guess = q.max(-1)
        columns = confidence.exp(), guess, cross_entropy(q, positions.targets), entropy(q)
        if not teacher.has_logits:
            return columns
        p = teacher.logits(positions.teacher).log_softmax(-1)
        agrees = (p.argmax(-1) == guess).to(q.dtype)
        return *columns, cross_entropy(p, positions.targets), forward_kl(q, p), reverse_kl(q, p), agrees

    valid = batch.valid
    positions = Positions(
        hidden_states(student, batch)[valid], batch.targets[valid], teacher.read(batch) if teacher.has_logits else {}
    )
    confidence, guess, *columns = in_chunks(measure_chunk, [positions], chunk_rows)
    names = (*STUDENT_MEANS, *(TEACHER_MEANS if teacher.has_logits else ()))
    wide = widest_float(valid.device)

    def sum_rows(column: Float[Tensor, " N"]) -> Float[Tensor, " B"]:
        return torch.zeros(valid.shape, dtype=wide, device=valid.device).masked_scatter(valid, column.to(wide)).sum(1)

    sums = {name: sum_rows(column) for name, column in zip(names, columns, strict=True)}
    in_bin = valid.nonzero()[:, 0] * BINS + (confidence * BINS).long().clamp(max=BINS - 1)
    hits = guess == positions.targets
    table = torch.stack([torch.ones_like(confidence), confidence, hits.to(confidence.dtype)], dim=1).to(wide)
    calibration = torch.zeros(len(valid) * BINS, 3, dtype=wide, device=valid.device).index_add_(0, in_bin, table)
    guesses = torch.full_like(batch.targets, IGNORE).masked_scatter(valid, guess)
    return {**sums, "positions": valid.sum(1), "calibration": calibration.view(-1, BINS, 3)}, guesses


@dataclass(frozen=True)
class Pair:
    """A student and its teacher, and how they read samples.

    Attributes:
        student: may be wrapped (DDP, FSDP2, PEFT). The caller puts it into evaluation mode.
        vocab: the number of classes that both models have.
        autocast: returns the context of a forward pass.
        batch_size: samples in a forward pass.
        chunk_rows: positions that an LM head computes at once.
    """

    student: nn.Module
    teacher: Teacher
    vocab: int | None
    device: torch.device
    pad_token_id: int = 0
    autocast: Callable[[], AbstractContextManager] = nullcontext
    batch_size: int = 8
    chunk_rows: int = 256


@dataclass(frozen=True)
class MeasuredSample:
    """The sums of a sample, with the student's likeliest tokens and the targets, both -100 at invalid positions."""

    sums: SequenceSums
    guesses: Int[Tensor, " T"]
    targets: Int[Tensor, " T"]


def measure_samples(
    pair: Pair, samples: Sequence[Sample], on_samples: Callable[[int], Any] = lambda number: None
) -> list[MeasuredSample]:
    """Measure each sample (:func:`measure_sequences`), in the order of the samples.

    Samples of similar length share a batch. The longest come first: memory runs out in the first batch, if at all.
    ``on_samples`` is called after each batch with its number of samples. Every process must have equally many samples,
    since the student may be sharded.
    """
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].input_ids))
    measured: dict[int, MeasuredSample] = {}
    for start in range(0, len(order), pair.batch_size):
        part = order[start : start + pair.batch_size]
        fields = collate([samples[i] for i in part], pair.pad_token_id)
        batch = Batch.from_inputs({name: tensor.to(pair.device) for name, tensor in fields.items()})
        with pair.autocast():
            sums, guesses = run_inside(
                pair.student,
                lambda b: measure_sequences(pair.student, pair.teacher, b, pair.vocab, pair.chunk_rows),
                batch,
            )
        columns = {name: of_sequences.cpu() for name, of_sequences in sums.items()}
        guesses, targets = guesses.cpu(), batch.targets.cpu()
        for b, i in enumerate(part):
            of_sample = {name: column[b] for name, column in columns.items()}
            measured[i] = MeasuredSample(of_sample, guesses[b], targets[b])
        on_samples(len(part))
    return [measured[i] for i in range(len(samples))]


def compute_held_out_means(sums: dict[str, Any]) -> dict[str, float]:
    """The mean of each sum over the positions, ``perplexity`` = exp(student_ce), ``ece``, and ``positions``.

    ``ece`` is the expected calibration error (Guo et al., 2017): the sum over bins of |hits - confidence| / positions.
    ``positions`` is their number.
    """
    number = max(sums["positions"], 1)
    metrics = {name: sums[name] / number for name in (*STUDENT_MEANS, *TEACHER_MEANS) if name in sums}
    metrics["perplexity"] = math.exp(min(metrics["student_ce"], 700))
    metrics["ece"] = sum(abs(hits - confidence) for _, confidence, hits in sums["calibration"]) / number
    return {**metrics, "positions": number}


def join_predictions(samples: list[tuple[Tensor, Tensor]]) -> EvalPrediction:
    """Join the likeliest tokens and the targets of samples as two arrays [samples T], padded with -100."""
    columns = zip(*samples, strict=True)
    guesses, targets = (pad_sequence([*c], batch_first=True, padding_value=IGNORE).numpy() for c in columns)
    return EvalPrediction(predictions=guesses, label_ids=targets)
