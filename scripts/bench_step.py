#!/usr/bin/env python3
"""Seconds and memory of one training step, four ways, in one run.

    python scripts/bench_step.py STUDENT TEACHER [--batch 2] [--tokens 512] [--rounds 7]

`backbones` runs both models up to their last hidden states, forward and (student) backward: the part that no selection
can save. The others add the distillation: SE-KD on 20 % of the positions, Full KD in chunks, and Full KD the usual way,
with both models' whole logits. The methods take turns within a round, so that a noisy machine disturbs all of them. The
table has medians over rounds and ratios to the dense step. Memory is the peak above the models and their gradients: on
a GPU by the allocator, on a CPU the largest sum of live tensor storage in a profile.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel

from sekd.distill import Method, distill
from sekd.distributions import entropy, kl_divergence
from sekd.losses import DIVERGENCES
from sekd.models import freeze, hidden_states
from sekd.policies import make_policy
from sekd.policies.ranks import top_k
from sekd.scores import Scoring, make_scoring
from sekd.teachers.live import LiveTeacher
from sekd.types import Batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--fraction", type=float, default=0.2)
    parser.add_argument("--chunk_rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.bfloat16).to(device).train()
    teacher = freeze(AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.bfloat16)).to(device)
    batch = random_batch(options.batch, options.tokens, student.config.vocab_size, device)

    def selective(name: str, fraction: float, scoring: Scoring | None) -> Callable[[], torch.Tensor]:
        policy, divergence = make_policy(name, fraction), DIVERGENCES["forward_kl"]
        method = Method(scoring, policy, divergence, chunk_rows=options.chunk_rows)
        return lambda: distill(student, LiveTeacher(teacher), batch, method)[0]

    steps: dict[str, Callable[[], torch.Tensor]] = {
        "backbones only": lambda: backbones(student, teacher, batch),
        f"SE-KD {options.fraction:.0%}": selective("top_k", options.fraction, make_scoring("student_entropy")),
        "Full KD in chunks": selective("all", 1.0, None),
        "Full KD, dense logits": lambda: dense(student, teacher, batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds + 1):  # the first round warms up
        for name, step in steps.items():
            seconds[name].append(time_step(step, student, device))
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    memory = {name: peak_bytes(step, student, device) for name, step in steps.items()}
    show(medians, memory, options, device)


def random_batch(sequences: int, tokens: int, vocab: int, device: torch.device) -> Batch:
    ids = torch.randint(vocab, (sequences, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    positions = torch.arange(tokens, device=device).expand(sequences, -1)
    return Batch(ids, targets, positions, torch.arange(sequences, device=device))


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


def time_step(step: Callable[[], torch.Tensor], student: PreTrainedModel, device: torch.device) -> float:
    """Seconds of a step, forward and backward, without the optimizer."""
    student.zero_grad(set_to_none=False)
    started = time.perf_counter()
    step().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(step: Callable[[], torch.Tensor], student: PreTrainedModel, device: torch.device) -> int:
    student.zero_grad(set_to_none=False)
    if device.type == "cuda":
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


def show(medians: dict[str, float], memory: dict[str, int], options: argparse.Namespace, device: torch.device) -> None:
    *_, last = medians
    first = next(iter(medians))
    title = f"one step, B {options.batch}, {options.tokens} tokens, bf16, {device.type}, median of {options.rounds}"
    table = Table(title=title)
    for column in ("step", "seconds", "of dense", "peak MiB", "above backbones, of dense"):
        table.add_column(column, justify="left" if column == "step" else "right")
    extra = max(memory[last] - memory[first], 1)
    for name, value in medians.items():
        share = (memory[name] - memory[first]) / extra
        row = (name, f"{value:.2f}", f"{value / medians[last]:.2f}", f"{memory[name] / 2**20:.0f}", f"{share:.2f}")
        table.add_row(*row)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
