"""How far is a student from its teacher on held-out positions?"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction

from sekd.distill import Method
from sekd.distributions import cross_entropy, entropy
from sekd.heads import in_chunks
from sekd.losses import forward_kl, reverse_kl
from sekd.models import get_head, hidden_states
from sekd.teachers import Teacher
from sekd.types import IGNORE, Batch, Positions

STUDENT_MEANS, TEACHER_MEANS = ("student_ce", "student_entropy"), ("forward_kl", "reverse_kl")
BINS = 15
"""Bins of confidence in the expected calibration error."""


@torch.no_grad()
def sum_held_out(
    student: nn.Module, teacher: Teacher, batch: Batch, method: Method
) -> tuple[dict[str, Tensor], Tensor]:
    """Sums over all valid positions in nats, and the student's likeliest token at each of them [B T].

    The sums are ``student_ce`` and ``student_entropy``, and ``forward_kl`` and ``reverse_kl`` if the teacher has its
    whole distribution. ``positions`` is the number of positions: divide by it for the mean a position. ``calibration``
    [BINS 3] has, for each bin of confidence, the number of positions, the sum of confidences, and how often the
    likeliest token is the target. The temperature is 1, whatever the training uses. The likeliest token at an invalid
    position is -100.
    """
    head = get_head(student, method.vocab).in_autocast_dtype()

    def measure_chunk(positions: Positions) -> tuple[Tensor, ...]:
        q = head(positions.hidden).log_softmax(-1)
        confidence, guess = q.max(-1)
        columns = confidence.exp(), guess, cross_entropy(q, positions.targets), entropy(q)
        if not teacher.has_logits:
            return columns
        p = teacher.logits(positions.teacher).log_softmax(-1)
        return *columns, forward_kl(q, p), reverse_kl(q, p)

    hidden, targets = hidden_states(student, batch)[batch.valid], batch.targets[batch.valid]
    positions = Positions(hidden, targets, teacher.read(batch) if teacher.has_logits else {})
    confidence, guess, *columns = in_chunks(measure_chunk, [positions], method.chunk_rows)
    names = (*STUDENT_MEANS, *(TEACHER_MEANS if teacher.has_logits else ()))
    sums = {name: column.sum() for name, column in zip(names, columns, strict=True)}
    in_bin = (confidence * BINS).long().clamp(max=BINS - 1)
    table = torch.stack([torch.ones_like(confidence), confidence, (guess == targets).to(confidence.dtype)], dim=1)
    calibration = torch.zeros(BINS, 3, dtype=table.dtype, device=table.device).index_add_(0, in_bin, table)
    guesses = torch.full_like(batch.targets, IGNORE).masked_scatter(batch.valid, guess)
    return {**sums, "positions": batch.valid.sum(), "calibration": calibration}, guesses


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
