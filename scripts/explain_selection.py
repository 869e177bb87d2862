"""Why do the methods of a sweep end where they end? Measure their first steps, and what their students learned where.

    cd runs/study/task_good
    python ../../../scripts/explain_selection.py study_task_off_policy --output off_policy

Writes two files.

OUTPUT_gradients.csv: the gradient of each method, for the student before training, on the same batches. `cosine` is to
Full KD's gradient on the same batch, `cosine_to_mean` to Full KD's mean gradient over other batches: does the step go
where the whole data wants to go? `norm` is its norm, `norm_over_full` that over Full KD's. `kl_share` is the share of
KL(p||q) that lies at the chosen positions, `overlap` the share of SE-KD's positions that are chosen, `fraction` that of
all. Policies that learn from steps (gls) are left out, since no step is taken.

OUTPUT_positions.csv: KL(p||q), KL(q||p) and student entropy on held-out data, before and after, at the fifth of the
positions of each sequence where the student was the least certain *before*, and at the others. Means over the seeds.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from datasets import Dataset
from jaxtyping import Bool, Float
from study_data import describe_work, make_trainer, write_csv
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from sekd.distributions import entropy
from sekd.heads import in_chunks
from sekd.losses import forward_kl, reverse_kl
from sekd.models import get_head, hidden_states
from sekd.policies import make_policy
from sekd.sweep.file import Sweep, SweepRun, read_sweep
from sekd.sweep.run_state import check_runs, is_finished
from sekd.sweep.steps import choose_points
from sekd.trainer import SEKDTrainer
from sekd.types import Batch, Positions

FRACTION = 0.2
PART = 1 << 22
"""Numbers that are converted to float64 at once."""
NAMES = ("forward_kl", "reverse_kl", "student_entropy")


@dataclass
class Step:
    """A method's gradient on a batch, and which of its N valid positions it chose."""

    gradient: Float[Tensor, " P"]
    chosen: Bool[Tensor, " N"]


def measure_gradients(sweep: Sweep, methods: Sequence[str], batches: int, others: int) -> Iterator[list[Any]]:
    """A row of OUTPUT_gradients.csv for each method."""
    runs = {run.method: run for run in sweep.runs}
    works: dict[str, str] = {}
    for method in methods:
        works.setdefault(describe_work(runs[method]), method)
    trainer = load_run(runs[sweep.baseline])
    rows = trainer.train_dataset.shuffle(seed=0)
    size = trainer.args.per_device_train_batch_size
    inputs = make_batches(trainer, rows.take((batches + others) * size))
    full = [take_step(trainer, batch) for batch in inputs[:batches]]
    mean = torch.stack([take_step(trainer, batch).gradient for batch in inputs[batches:]]).mean(0)
    divergences = [measure_positions(trainer, Batch.from_inputs(batch))[0] for batch in inputs[:batches]]
    by_entropy = [choose_by_entropy(trainer, Batch.from_inputs(batch)) for batch in inputs[:batches]]
    for method in works.values():
        trainer = load_run(runs[method])
        if trainer.method.policy.has_state:  # it learns from steps, and none is taken here
            continue
        values = []
        for batch, of_full, kl, uncertain in zip(inputs, full, divergences, by_entropy, strict=False):
            step = take_step(trainer, batch)
            values.append(
                (
                    cosine(step.gradient, of_full.gradient),
                    cosine(step.gradient, mean),
                    norm(step.gradient),
                    norm(step.gradient) / norm(of_full.gradient),
                    kl[step.chosen].sum() / kl.sum(),
                    (step.chosen & uncertain).sum() / uncertain.sum(),
                    step.chosen.float().mean(),
                )
            )
        yield [method, *torch.tensor(values).mean(0).tolist()]


def measure_students(sweep: Sweep, methods: Sequence[str]) -> Iterator[list[Any]]:
    """A row of OUTPUT_positions.csv for the student before training, and for each method."""
    chosen = choose_points(sweep, check_runs(sweep))
    runs = [run for run in sweep.runs if is_finished(run) and chosen.get(run.method) == run.place]
    trainer = load_run(next(run for run in sweep.runs if run.method == sweep.baseline))
    batches = [Batch.from_inputs(inputs) for inputs in make_batches(trainer, trainer.eval_dataset)]
    uncertain = torch.cat([choose_by_entropy(trainer, batch) for batch in batches])
    yield ["Student before", *summarize(trainer, batches, uncertain)]
    for method in methods:
        values = []
        for run in runs:
            if run.method == method:
                trainer.model = AutoModelForCausalLM.from_pretrained(run.folder, dtype=torch.float32).eval()
                values.append(summarize(trainer, batches, uncertain))
        if values:
            yield [method, *torch.tensor(values).mean(0).tolist()]


def summarize(trainer: SEKDTrainer, batches: Sequence[Batch], uncertain: Bool[Tensor, " N"]) -> list[float]:
    """The means of NAMES at the uncertain positions, then at the others."""
    columns = [torch.cat(parts) for parts in zip(*(measure_positions(trainer, b) for b in batches), strict=True)]
    return [float(column[mask].mean()) for mask in (uncertain, ~uncertain) for column in columns]


def load_run(run: SweepRun) -> SEKDTrainer:
    """The trainer of a run, in float32 throughout."""
    with tempfile.TemporaryDirectory() as folder:
        return make_trainer(run, folder, "--bf16", "false")


def make_batches(trainer: SEKDTrainer, rows: Dataset) -> list[dict[str, Tensor]]:
    """Rows as batches of the size of the run's."""
    size = trainer.args.per_device_train_batch_size
    samples = trainer.data_collator(list(rows))
    return [trainer._collate(samples[start : start + size]) for start in range(0, len(samples), size)]


def take_step(trainer: SEKDTrainer, inputs: dict[str, Tensor]) -> Step:
    """The gradient of a batch's loss; no weight changes."""
    chosen: list[Tensor] = []
    vars(trainer.method.policy)["observe"] = lambda batch, mask, state: chosen.append(mask)
    trainer.model.zero_grad()
    sequences = (inputs["targets"] >= 0).any(1).sum()
    trainer.compute_loss(trainer.model, inputs, num_items_in_batch=sequences).backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return Step(gradient, chosen[0])


def dot(first: Float[Tensor, " P"], second: Float[Tensor, " P"]) -> Tensor:
    """The inner product, summed in float64: in float32, 100 million products lose some percent."""
    parts = zip(first.split(PART), second.split(PART), strict=True)
    return torch.stack([(a.double() * b.double()).sum() for a, b in parts]).sum()


def norm(gradient: Float[Tensor, " P"]) -> Tensor:
    """The length of a gradient."""
    return dot(gradient, gradient).sqrt()


def cosine(first: Float[Tensor, " P"], second: Float[Tensor, " P"]) -> Tensor:
    """The cosine of the angle between two gradients."""
    return dot(first, second) / (norm(first) * norm(second))


@torch.no_grad()
def measure_positions(trainer: SEKDTrainer, batch: Batch) -> tuple[Float[Tensor, " N"], ...]:
    """NAMES at each valid position."""
    head = get_head(trainer.model, trainer.method.vocab)

    def measure_chunk(positions: Positions) -> tuple[Tensor, ...]:
        q = head(positions.hidden).log_softmax(-1)
        p = trainer.teacher.logits(positions.teacher).log_softmax(-1)
        return forward_kl(q, p), reverse_kl(q, p), entropy(q)

    hidden = hidden_states(trainer.model, batch)[batch.valid]
    positions = Positions(hidden, batch.targets[batch.valid], trainer.teacher.read(batch))
    return in_chunks(measure_chunk, [positions], trainer.method.chunk_rows)


def choose_by_entropy(trainer: SEKDTrainer, batch: Batch) -> Bool[Tensor, " N"]:
    """SE-KD's choice: the fifth of the positions of each sequence with the highest student entropy."""
    scores = torch.zeros(batch.valid.shape).masked_scatter(batch.valid, measure_positions(trainer, batch)[2])
    return (make_policy("top_k", FRACTION)(scores, batch.valid) > 0)[batch.valid]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="a file, or a sweep that sekd ships")
    parser.add_argument("--output", required=True, help="the files' path, without their ending")
    parser.add_argument("--methods", nargs="+", help="of the sweep; all that train on the same samples by default")
    parser.add_argument("--batches", type=int, default=8, help="batches whose gradients are compared (8)")
    parser.add_argument("--others", type=int, default=24, help="batches of the mean gradient (24)")
    parser.add_argument("--only", choices=["gradients", "positions"], help="write this file alone")
    options, overrides = parser.parse_known_args()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    sweep = read_sweep(options.sweep, overrides)
    keys = {run.method: run.keys for run in sweep.runs}
    alike = [name for name, own in keys.items() if own.get("sample_fraction", 1) == 1]
    methods = options.methods or alike
    if options.only != "positions":
        header = ["method", "cosine", "cosine_to_mean", "norm", "norm_over_full", "kl_share", "overlap", "fraction"]
        write_csv(
            f"{options.output}_gradients.csv",
            header,
            measure_gradients(sweep, methods, options.batches, options.others),
        )
    if options.only != "gradients":
        header = ["method", *(f"{name}_{place}" for place in ("uncertain", "others") for name in NAMES)]
        write_csv(f"{options.output}_positions.csv", header, measure_students(sweep, methods))


if __name__ == "__main__":
    main()
