#!/usr/bin/env python3
"""Seconds and memory of an optimizer step through SEKDTrainer and through TRL's own distillation trainers, in one run.

    python scripts/bench_peers.py STUDENT TEACHER [--batch 2] [--tokens 512] [--rounds 5] [--json FILE]

Every trainer has a process of its own, with the same weights, sequences, precision and AdamW. All divergences are the
forward KL. The processes take turns: each trains one step while the others wait. So a noisy machine disturbs all of
them. All are in memory at once. The first step warms up. The table has medians of the others, from the end of a step to
the end of the next one, without the wait. Memory is the peak of the process: allocated on a GPU, else resident. So it
includes the libraries, the weights and the optimizer's state.

The tokens are random. The prompt of a sequence is its first token, so all logits but the last count in a loss over all
positions. The script fails unless all trainers have the same number of targets. It also fails unless the losses of Full
KD and of TRL's trainers in the first step are equal within rounding. TRL's mean is over tokens, and sekd's is over
sequences. Both are the same here, since all sequences have the same length.

What TRL's trainers do differently:

- GKDTrainer computes the logits of all positions at once, and copies them to float32 under autocast. It empties the
  cache of the GPU's allocator in each step.
- DistillationTrainer computes both models' logits in tiles, and again in the backward pass. It also computes the
  student's entropy for its log. Without Triton, so on every CPU, its heads run in float32, whatever the autocast.
- DistillationTrainer trains on its student's rollouts alone. Here it gets the completions of the data in place of
  rollouts, and its time has no generation.
- DistillationTrainer replaces the forward that Accelerate puts under autocast. So in TRL 1.16 a student with float32
  weights computes in float32, even with `bf16`. Here it computes under autocast, as all others.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from bench_table import write_figures
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from sekd import SEKDConfig, SEKDTrainer
from sekd.hardware import choose_dtype, measure_memory
from sekd.models import freeze, load_model

MOST_ROUNDING = 0.005
"""Nats by which the losses of the first step may differ. bf16 makes 0.0014 with SmolLM2."""


class GivenCompletionsTrainer(DistillationTrainer):
    """DistillationTrainer on the completions of the data, with the autocast that TRL 1.16 loses."""

    def _generate(self, prompts: list) -> tuple:
        prompt_ids, completion_ids = zip(*prompts, strict=True)
        return prompt_ids, completion_ids, None, None, []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with self.accelerator.autocast():
            return super().compute_loss(*args, **kwargs)


@dataclass(frozen=True)
class Contestant:
    """A trainer, its options, and which entries of its inputs are targets."""

    trainer: Callable[..., Any]
    config: Callable[..., Any]
    find_targets: Callable[[dict[str, Tensor]], Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def sekd(policy: str) -> Contestant:
    """SEKDTrainer, which cuts no sequence here. SIGTERM ends it at once, as the others."""
    options = {"position_policy": policy, "max_length": 2**20, "save_on_signal": False}
    return Contestant(SEKDTrainer, SEKDConfig, lambda inputs: inputs["targets"] >= 0, options)


GKD, DISTILLATION, FULL_KD = "TRL GKDTrainer", "TRL DistillationTrainer", "sekd Full KD"
CONTESTANTS = {
    "sekd SE-KD 20%": sekd("top_k"),
    "sekd random 20%": sekd("random"),
    FULL_KD: sekd("all"),
    GKD: Contestant(GKDTrainer, GKDConfig, lambda inputs: inputs["labels"][:, 1:] != -100, {"lmbda": 0.0, "beta": 0.0}),
    DISTILLATION: Contestant(
        GivenCompletionsTrainer,
        DistillationConfig,
        lambda inputs: inputs["completion_mask"] > 0,
        {"beta": 0.0, "shuffle_dataset": False},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = compete(options, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    computing = f"{choose_dtype(device == 'cpu')}, {device}"
    title = f"a step of a trainer, B {options.batch}, {options.tokens} tokens, {computing}, median of {options.rounds}"
    show(figures, title)
    check(figures)
    write_figures(options.json, title, figures)


def compete(options: argparse.Namespace, folder: str) -> dict[str, dict[str, float]]:
    """The figures of each contestant. The processes take their steps in turns."""
    context = multiprocessing.get_context("spawn")
    processes, connections = [], {}
    for name in CONTESTANTS:
        connections[name], child = context.Pipe()
        process = context.Process(target=train, args=(child, name, options, f"{folder}/{name}"), daemon=True)
        process.start()
        child.close()
        processes.append(process)
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in tqdm(range(options.rounds + 1), desc="rounds"):  # the first one warms up
        for name, connection in connections.items():
            connection.send("step")
            seconds[name].append(connection.recv())
    figures = {}
    for name, connection in connections.items():
        connection.send("end")
        figures[name] = {"seconds": statistics.median(seconds[name][1:]), **connection.recv()}
    for process in processes:
        process.join()
    gkd, distillation = figures[GKD], figures[DISTILLATION]
    least = min(gkd["peak_bytes"], distillation["peak_bytes"])
    for measured in figures.values():
        measured["seconds_over_gkd"] = measured["seconds"] / gkd["seconds"]
        measured["seconds_over_distillation"] = measured["seconds"] / distillation["seconds"]
        measured["bytes_over_least"] = measured["peak_bytes"] / least
    return figures


class Turns(TrainerCallback):
    """Waits for the parent before each step, and sends it the seconds of the step."""

    def __init__(self, parent: Connection) -> None:
        self.parent, self.started = parent, 0.0

    def wait(self) -> None:
        self.parent.recv()
        self.started = time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.parent.send(time.perf_counter() - self.started)
        self.wait()


def train(parent: Connection, name: str, options: argparse.Namespace, folder: str) -> None:
    """Train in this process, in turns, and send the other figures in the end."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    contestant, on_cpu = CONTESTANTS[name], not torch.cuda.is_available()
    dtype = choose_dtype(on_cpu)
    steps = options.rounds + 1
    args = contestant.config(
        output_dir=folder,
        per_device_train_batch_size=options.batch,
        max_steps=steps,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        bf16=dtype == "bfloat16",
        use_cpu=on_cpu,
        gradient_checkpointing=False,
        logging_first_step=True,
        logging_steps=10 * steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **contestant.options,
    )
    trainer = contestant.trainer(
        model=load_model(options.student, dtype=torch.float32),
        teacher_model=freeze(load_model(options.teacher, dtype=dtype)),
        args=args,
        train_dataset=make_rows(options, steps),
        processing_class=AutoTokenizer.from_pretrained(options.student),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Turns(parent))
    compute_loss, targets = trainer.compute_loss, []

    def count_targets(model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        targets.append(contestant.find_targets(inputs).sum())
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = count_targets
    trainer.train()
    first_loss = trainer.state.log_history[0]["loss"]
    parent.send({"peak_bytes": measure_memory(), "targets": int(sum(targets)), "first_loss": first_loss})


def make_rows(options: argparse.Namespace, steps: int) -> Dataset:
    """Random sequences in the columns that the trainers read."""
    vocab = AutoConfig.from_pretrained(options.student).vocab_size
    shape = (steps * options.batch, options.tokens)
    sequences = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(0)).tolist()
    completion_mask = [0] + [1] * (options.tokens - 1)
    return Dataset.from_list(
        [
            {
                "prompt_ids": ids[:1],  # SEKDTrainer reads these two
                "completion_ids": ids[1:],
                "input_ids": ids,  # GKDTrainer reads these two
                "completion_mask": completion_mask,
                "prompt": [ids[:1], ids[1:]],  # for GivenCompletionsTrainer; GKDTrainer only asks for the column
            }
            for ids in sequences
        ]
    )


def check(figures: dict[str, dict[str, float]]) -> None:
    """Fail if the trainers had different targets or losses."""
    targets = {name: measured["targets"] for name, measured in figures.items()}
    if len(set(targets.values())) > 1:
        raise SystemExit(f"the trainers had different numbers of targets: {targets}")
    losses = {name: figures[name]["first_loss"] for name in (FULL_KD, GKD, DISTILLATION)}
    if max(losses.values()) - min(losses.values()) > MOST_ROUNDING:
        raise SystemExit(f"the losses of the first step differ: {losses}")


def show(figures: dict[str, dict[str, float]], title: str) -> None:
    """Print the table."""
    columns = "seconds", "over GKD", "over Distillation", "peak GB", "over TRL's least", "first loss", "targets"
    table = Table("trainer", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for name, measured in figures.items():
        table.add_row(
            name,
            f"{measured['seconds']:.2f}",
            f"{measured['seconds_over_gkd']:.2f}",
            f"{measured['seconds_over_distillation']:.2f}",
            f"{measured['peak_bytes'] / 1e9:.2f}",
            f"{measured['bytes_over_least']:.2f}",
            f"{measured['first_loss']:.4f}",
            f"{measured['targets']:.0f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
