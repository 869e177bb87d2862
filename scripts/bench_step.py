#!/usr/bin/env python3
"""Seconds and memory of one training step, five ways, in one run.

    python scripts/bench_step.py STUDENT TEACHER [--batch 2] [--tokens 512] [--rounds 7]

`backbones only` runs both models up to their last hidden states, forward and (student) backward: the part that no
selection can save. The others add the distillation: SE-KD on 20 % of the positions, the same with the sampler's
scores (`score_source: rollout`, no scoring pass), Full KD in chunks, and Full KD the usual way, with both models' whole
logits. The methods take turns within a round, so that a noisy machine disturbs all of them. The table has medians over
rounds and their ratios. Memory is the peak above the models and their gradients: on a GPU by the allocator, on a CPU
the largest sum of live tensor storage in a profile.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from bench_table import write_figures
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from sekd.distill import Method, distill
from sekd.distributions import entropy, kl_divergence
from sekd.hardware import choose_dtype
from sekd.losses import DIVERGENCES
from sekd.models import freeze, hidden_states, load_model
from sekd.policies import make_policy
from sekd.policies.ranks import top_k
from sekd.scores import make_scoring
from sekd.teachers.live import LiveTeacher
from sekd.types import Batch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BACKBONES, SEKD, SAMPLER = "backbones only", "SE-KD", "SE-KD, sampler's scores"
CHUNKED, DENSE = "Full KD in chunks", "Full KD, dense logits"
COLUMNS = {
    "seconds": ".2f",
    "of dense": ".2f",
    "of backbones": ".2f",
    "peak MiB": ".0f",
    "above backbones, of dense": ".2f",
}
Steps = dict[str, Callable[[], torch.Tensor]]
"""Name of a method -> a function that returns the loss of one step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--batch", type=at_least(1), default=2)
    parser.add_argument("--tokens", type=at_least(2), default=512)
    parser.add_argument("--fraction", type=float, default=0.2)
    parser.add_argument("--rounds", type=at_least(1), default=7)
    add_common_options(parser)
    options = parser.parse_args()
    device, dtype = find_device(), DTYPES[options.dtype]
    student = load_model(options.student, dtype=torch.float32).to(device).train()
    teacher = freeze(load_model(options.teacher, dtype=dtype)).to(device)
    batch = random_batch(options.batch, options.tokens, student.config.vocab_size, device)
    steps = make_steps(student, teacher, batch, options.fraction, options.chunk_rows, dtype)
    memory = {name: peak_bytes(step, student) for name, step in steps.items()}  # warms up
    seconds = take_turns(steps, student, options.rounds)
    rows = {name: compare(name, seconds, memory) for name in steps}
    size = f"B {options.batch}, T {options.tokens}, k {100 * options.fraction:g} %, {options.dtype}, {device.type}"
    title = f"one step, {size}, median of {options.rounds}"
    table = Table("step", title=title)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for name, figures in rows.items():
        table.add_row(name, *(f"{figures[column]:{form}}" for column, form in COLUMNS.items()))
    Console(width=120).print(table)
    write_figures(options.json, title, rows)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options that this script and bench_costs.py share."""
    fastest = choose_dtype(on_cpu=find_device().type == "cpu")
    parser.add_argument("--chunk_rows", type=int, default=256, help="positions of a chunk on a GPU")
    parser.add_argument("--dtype", choices=DTYPES, default=fastest, help=f"{fastest} is the faster one here")
    parser.add_argument("--json", help="file for the figures")


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from {least} on")
        return int(text)

    return read


def find_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_batch(sequences: int, tokens: int, vocab: int, device: torch.device) -> Batch:
    ids = torch.randint(vocab, (sequences, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    positions = torch.arange(tokens, device=device).expand(sequences, -1)
    return Batch(ids, targets, positions, torch.arange(sequences, device=device))


def make_steps(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Batch,
    fraction: float,
    chunk_rows: int,
    dtype: torch.dtype,
) -> Steps:
    """Each method's step on the batch. As in training, the student has float32 weights under autocast to ``dtype``."""
    divergence, entropy = DIVERGENCES["forward_kl"], make_scoring("student_entropy")
    sekd = Method(entropy, make_policy("top_k", fraction), divergence, chunk_rows=chunk_rows)
    full = Method(None, make_policy("all", 1.0), divergence, chunk_rows=chunk_rows)
    rollouts = replace(batch, student_entropy=torch.rand(batch.valid.shape, device=batch.valid.device))
    steps = {
        BACKBONES: lambda: backbones(student, teacher, batch),
        SEKD: lambda: distill(student, LiveTeacher(teacher), batch, sekd)[0],
        SAMPLER: lambda: distill(student, LiveTeacher(teacher), rollouts, sekd)[0],
        CHUNKED: lambda: distill(student, LiveTeacher(teacher), batch, full)[0],
        DENSE: lambda: dense(student, teacher, batch),
    }
    return {name: partial(in_autocast, student.device, dtype, step) for name, step in steps.items()}


def in_autocast(device: torch.device, dtype: torch.dtype, step: Callable[[], torch.Tensor]) -> torch.Tensor:
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return step()


def backbones(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        hidden_states(teacher, batch)
    return hidden_states(student, batch).float().mean()


def dense(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Full KD as one would write it first: all logits of both models at once."""
    with torch.no_grad():
        p = teacher(input_ids=batch.input_ids, use_cache=False).logits
    q = student(input_ids=batch.input_ids, use_cache=False).logits
    p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    losses = (p.exp() * (p - q)).sum(-1)
    return (losses * batch.valid).sum() / batch.valid.sum(1)[0]


def dense_selective(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, fraction: float) -> torch.Tensor:
    """SE-KD without selective heads: all logits of both models, of which the chosen positions' are compared."""
    with torch.no_grad():
        p = teacher(input_ids=batch.input_ids, use_cache=False).logits
    q = student(input_ids=batch.input_ids, use_cache=False).logits
    with torch.no_grad():
        entropies = entropy(q.float().log_softmax(-1).flatten(0, 1)).view(batch.valid.shape)
        weights = top_k(entropies, batch.valid, fraction)
    chosen = weights > 0
    p, q = (logits[chosen].float().log_softmax(-1) for logits in (p, q))
    return (weights[chosen] * kl_divergence(p, q)).sum()


def time_step(step: Callable[[], torch.Tensor], student: PreTrainedModel) -> float:
    """Seconds of a step, forward and backward, without the optimizer."""
    student.zero_grad(set_to_none=False)
    started = time.perf_counter()
    step().backward()
    if student.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def take_turns(steps: Steps, student: PreTrainedModel, rounds: int) -> dict[str, float]:
    """Median seconds of each step. In each round, every step runs once."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(time_step(step, student))
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_bytes(step: Callable[[], torch.Tensor], student: PreTrainedModel) -> int:
    """The largest memory of a step, above what is there before it: the models and the student's gradients."""
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if student.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step().backward()
        return torch.cuda.max_memory_allocated() - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step().backward()
    live = peak = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def compare(name: str, seconds: dict[str, float], memory: dict[str, int]) -> dict[str, float]:
    """A row of the table: a method beside the dense one and the backbones."""
    return {
        "seconds": seconds[name],
        "of dense": seconds[name] / seconds[DENSE],
        "of backbones": seconds[name] / seconds[BACKBONES],
        "peak MiB": memory[name] / 2**20,
        "above backbones, of dense": (memory[name] - memory[BACKBONES]) / max(memory[DENSE] - memory[BACKBONES], 1),
    }


if __name__ == "__main__":
    main()
