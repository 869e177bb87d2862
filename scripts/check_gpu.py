#!/usr/bin/env python3
"""What a GPU must show: steps equal the CPU's, runs resume, and what a step costs at the paper's size.

    python scripts/check_gpu.py [--device cuda] [--output_dir runs/check_gpu] [--tiny]

The first tables compare. Each step of a tiny pair in float32, without TF32, equals the CPU's: every policy, divergence,
score and class selection. A resumed run has the weights of an undisturbed one. The exit status is 1 if one differs.

The last table has costs: the median seconds of a step without the optimizer, and the peak memory, in all and above
models and gradients. Qwen3-8B teaches Qwen3-1.7B, both with random weights, in the precision that SEKDTrainer chooses
for a GPU: a bf16 teacher, and a float32 student under bf16 autocast. "All logits" is SE-KD without selective heads, as
"default flow" in table 16 of arXiv 2602.01395. SE-KD_3X reads a cache, and no teacher is in memory. --tiny takes tiny
models instead. Both files in --output_dir, check_gpu.md and check_gpu.json, grow with each row.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import transformers
from bench_step import backbones, dense, dense_selective, peak_bytes, random_batch, time_step
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Qwen3Config
from transformers.utils.logging import disable_progress_bar

from sekd import SEKDConfig, SEKDTrainer
from sekd.cache.build import build_cache
from sekd.cache.readers import LocalReader
from sekd.cache.teacher import CachedTeacher
from sekd.classes import CLASS_SELECTIONS
from sekd.cli.demo.pipeline import make_model
from sekd.cli.demo.word_problems import build_tokenizer, make_problems
from sekd.data.batch import Sample, collate
from sekd.data.prepare import prepare
from sekd.distill import Method, distill, kl_after_step
from sekd.fingerprints import sample_key
from sekd.losses import DIVERGENCES
from sekd.models import check_head, freeze
from sekd.policies import POLICIES, FinishedStep, make_policy
from sekd.scores import SCORES, make_scoring
from sekd.seeds import make_generators
from sekd.teachers import LiveTeacher, Teacher
from sekd.types import Batch

QWEN3: dict[str, Any] = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-6}
MODELS: dict[str, dict[str, Any]] = {
    "student": QWEN3
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"tie_word_embeddings": True},
    "teacher": QWEN3
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"tie_word_embeddings": False},
}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
SEQUENCES, FRACTION, ROUNDS = 2, 0.2, 5
TOKENS, TINY_TOKENS = {512: False, 2048: False, 8192: True}, {16: False, 32: True}
"""Tokens of a sequence, and whether the student's activations are computed again (gradient checkpointing)."""

STEPS: dict[str, dict[str, Any]] = {
    **{f"policy {name}": {"position_policy": name} for name in POLICIES},
    **{f"divergence {name}": {"divergence": name} for name in DIVERGENCES},
    **{f"score {name}": {"position_score": name} for name in SCORES},
    **{f"classes {name}": {"class_selection": name, "class_samples": 16} for name in CLASS_SELECTIONS},
    "sampled softmax": {"class_selection": "rs_kd", "class_samples": 16, "sampled_softmax": 64},
}
TOLERANCE = 1e-4
"""The largest difference of a loss or gradient, as a share of the CPU's: float32 adds up in another order."""

RUNS: dict[str, dict[str, Any]] = {
    "off-policy, gls": {"position_policy": "gls"},
    "on-policy, hf": {"lmbda": 1.0, "rollout_engine": "hf", "max_completion_length": 8},
}
RESUMED_TOLERANCE = 1e-5
"""The largest difference of a weight after a resumed run. On a GPU, some sums have no fixed order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output_dir", default="runs/check_gpu")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("highest")
    logging.disable(logging.WARNING)
    disable_progress_bar()
    disable_progress_bars()
    tokenizer = build_tokenizer(make_problems(64, seed=0))
    report = Report(options.output_dir, describe_machine(device))
    report.check("A step against the CPU's", TOLERANCE, compare_steps(tokenizer, device))
    report.check("A resumed run against an undisturbed one", RESUMED_TOLERANCE, compare_runs(tokenizer, device))
    pair = "a tiny Qwen3 pair" if options.tiny else "Qwen3-8B to Qwen3-1.7B"
    title = f"Cost of a step: {pair}, {SEQUENCES} sequences, median of {ROUNDS}"
    report.table(title, measure_steps(tokenizer, device, options.tiny))
    sys.exit(report.failed)


class Report:
    """Tables in Markdown, printed row by row, and the same as JSON."""

    def __init__(self, folder: str, machine: str) -> None:
        os.makedirs(folder, exist_ok=True)
        self.folder, self.failed = folder, False
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.lines: list[str] = []
        self.print(machine)

    def print(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)
        with open(os.path.join(self.folder, "check_gpu.md"), "w") as file:
            file.writelines(f"{line}\n" for line in self.lines)
        with open(os.path.join(self.folder, "check_gpu.json"), "w") as file:
            json.dump({"machine": self.lines[0], **self.rows}, file, indent=1)

    def table(self, title: str, rows: Iterable[dict[str, Any]]) -> None:
        self.rows[title] = []
        for row in rows:
            if not self.rows[title]:
                self.print("", f"**{title}**", "", f"| {' | '.join(row)} |", f"|{'---|' * len(row)}")
            self.rows[title].append(row)
            self.print(f"| {' | '.join(map(str, row.values()))} |")

    def check(self, title: str, tolerance: float, rows: Iterable[dict[str, Any]]) -> None:
        """A table whose rows have differences, which must not exceed the tolerance."""

        def judged() -> Iterable[dict[str, Any]]:
            for row in rows:
                differences = [value for value in row.values() if isinstance(value, float)]
                failed = not all(difference <= tolerance for difference in differences)
                self.failed |= failed
                yield {name: f"{v:.1e}" if isinstance(v, float) else v for name, v in row.items()} | {
                    f"at most {tolerance:.0e}": "FAIL" if failed else "ok"
                }

        self.table(title, judged())


def describe_machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{device.type} ({name}), {versions}, Python {platform.python_version()}"


# Comparisons


def compare_steps(tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Iterable[dict[str, Any]]:
    for name, choices in STEPS.items():
        expected, own = (take_step(tokenizer, place, choices) for place in (torch.device("cpu"), device))
        difference = {key: float((own[key] - expected[key]).norm() / expected[key].norm()) for key in expected}
        yield {"step": name, **difference}


def take_step(tokenizer: PreTrainedTokenizerBase, device: torch.device, choices: dict[str, Any]) -> dict[str, Any]:
    """The loss and the whole gradient of a step, computed in float32 on the device."""
    args = SEKDConfig(output_dir="unused", bf16=False, position_fraction=FRACTION, head_chunk_rows=32, **choices)
    models = (make_model(tokenizer, hidden=128, layers=2, heads=2, seed=seed) for seed in (0, 1))
    student, model = (model.to(device) for model in models)
    batch = random_batch(4, 48, len(tokenizer), device)
    teacher, method, step = LiveTeacher(freeze(model)), Method.from_config(args, len(tokenizer)), 3
    loss, _ = distill(student, teacher, batch, method, step, make_generators(batch, args.seed, step))
    loss.backward()
    method.policy.end_step(FinishedStep(kl_after=lambda *part: kl_after_step(student, teacher, *part, method)))
    gradient = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    return {"loss": loss.detach().cpu().double(), "gradient": gradient.cpu().double()}


def compare_runs(tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Iterable[dict[str, Any]]:
    """Four optimizer steps at once, and again from the checkpoint after two."""
    problems = make_problems(16, seed=1)
    rows = Dataset.from_list([{"prompt": p["question"], "completion": p["answer"]} for p in problems])
    for name, choices in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            keys = {"output_dir": folder, "use_cpu": device.type == "cpu", "report_to": "none", "disable_tqdm": True}
            keys |= {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "log_completions_steps": 0}
            weights = []
            for checkpoint in (None, os.path.join(folder, "checkpoint-2")):
                student, teacher = (make_model(tokenizer, 128, 2, 2, seed) for seed in (0, 1))
                trainer = SEKDTrainer(student, teacher, SEKDConfig(**keys | choices), rows, processing_class=tokenizer)
                trainer.remove_callback(PrinterCallback)
                trainer.train(checkpoint)
                weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        yield {"run": name, "largest difference of a weight": float((weights[0] - weights[1]).abs().max())}


# Costs


def measure_steps(tokenizer: PreTrainedTokenizerBase, device: torch.device, is_tiny: bool) -> Iterable[dict[str, Any]]:
    sizes, lengths = (TINY, TINY_TOKENS) if is_tiny else ({}, TOKENS)
    student = make_random_model(MODELS["student"] | sizes, torch.float32, device).train()
    teacher = freeze(make_random_model(MODELS["teacher"] | sizes, torch.bfloat16, device))
    check_head(student, packed=True)
    check_head(teacher, packed=True)
    batches = {tokens: random_batch(SEQUENCES, tokens, student.config.vocab_size, device) for tokens in lengths}
    forward_kl, entropies = DIVERGENCES["forward_kl"], make_scoring("student_entropy")
    full_kd = Method(None, make_policy("all"), forward_kl)
    se_kd = Method(entropies, make_policy("top_k", FRACTION), forward_kl)

    live = LiveTeacher(teacher)
    steps: dict[str, Callable[[Batch], torch.Tensor]] = {
        "backbones alone": partial(backbones, student, teacher),
        "Full KD, dense": partial(dense, student, teacher),
        "Full KD, in chunks": partial(compute_loss, student, live, full_kd),
        "SE-KD 20 %, all logits": partial(dense_selective, student, teacher, fraction=FRACTION),
        "SE-KD 20 %, selective heads": partial(compute_loss, student, live, se_kd),
    }
    for tokens, recomputes in lengths.items():
        for name, step in steps.items():
            yield measure_step(name, partial(step, batches[tokens]), student, tokens, recomputes, device)
    with tempfile.TemporaryDirectory() as folder:
        cached = {n: cache_batch(teacher, batch, tokenizer, f"{folder}/{n}") for n, batch in batches.items()}
        del teacher, live, steps, step
        for tokens, (cache, batch) in cached.items():
            step = partial(compute_loss, student, cache, se_kd, batch)
            yield measure_step("SE-KD_3X, from a cache", step, student, tokens, lengths[tokens], device)


def compute_loss(student: PreTrainedModel, teacher: Teacher, method: Method, batch: Batch) -> torch.Tensor:
    return distill(student, teacher, batch, method)[0]


def make_random_model(sizes: dict[str, Any], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    with device:
        return AutoModelForCausalLM.from_config(Qwen3Config(**sizes), dtype=dtype)


def measure_step(
    name: str,
    step: Callable[[], torch.Tensor],
    student: PreTrainedModel,
    tokens: int,
    recomputes: bool,
    device: torch.device,
) -> dict[str, Any]:
    """Median seconds of a step, and the peak of the allocator, which a CPU has not."""
    (student.gradient_checkpointing_enable if recomputes else student.gradient_checkpointing_disable)()

    def step_in_bf16() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return step()

    row = {"step": name, "tokens": tokens, "activations": "recomputed" if recomputes else "kept"}
    try:
        seconds = statistics.median([time_step(step_in_bf16, student) for _ in range(ROUNDS + 1)][1:])
        own = peak_bytes(step_in_bf16, student)
    except torch.OutOfMemoryError:
        return row | {"seconds": "out of memory", "peak GiB": "", "of the step": ""}
    finally:
        torch.cuda.empty_cache()
    peaks = {"peak GiB": torch.cuda.max_memory_allocated(), "of the step": own}
    return row | {"seconds": f"{seconds:.3f}"} | {key: f"{value / 2**30:.2f}" for key, value in peaks.items()}


def cache_batch(
    teacher: PreTrainedModel, batch: Batch, tokenizer: PreTrainedTokenizerBase, folder: str
) -> tuple[CachedTeacher, Batch]:
    """The batch's sequences in a cache, and the batch whose samples name them there."""
    args = SEKDConfig(output_dir=folder, max_length=batch.input_ids.shape[1], bf16=False, disable_tqdm=True)
    rows = [{"prompt_ids": ids[:1], "completion_ids": ids[1:]} for ids in batch.input_ids.tolist()]
    samples = prepare(Dataset.from_list(rows), tokenizer, args)
    store = build_cache(samples, LocalReader(teacher, teacher.config.vocab_size, args), tokenizer, args, folder)
    keys = {sample["sample_id"]: sample_key(sample) for sample in samples}
    fields = collate([Sample(**sample) for sample in samples], 0)
    return CachedTeacher(store, keys), Batch(**fields).to(batch.input_ids.device)


if __name__ == "__main__":
    main()
