"""Run under torchrun by test_trainer_distributed.py; writes what rank 0 found to a file."""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from helpers import ONE_SGD_STEP, make_model, make_pairs, make_tokenizer, make_trainer, make_vllm_model, trained_weights
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sekd.cache.teacher import CachedTeacher
from sekd.data.batch import Sample, collate
from sekd.distill import Method, distill
from sekd.losses import DIVERGENCES
from sekd.models import freeze, run_inside
from sekd.on_policy.weights import full_weights
from sekd.policies import make_policy
from sekd.scores import Scoring
from sekd.teachers.live import LiveTeacher
from sekd.types import Batch

ENTROPY = Scoring(("student_entropy",), (1.0,))


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    lengths = [(2, 9), (5, 3), (3, 12), (4, 1)]
    return [
        Sample(torch.randint(0, 120, (p + c,), generator=generator).tolist(), [0] * p + [1] * c, i, p)
        for i, (p, c) in enumerate(lengths)
    ]


def gradients(student, rows, sequences, processes):
    """Loss and gradients of this process's share of a step."""
    method = Method(ENTROPY, make_policy("top_k", 0.3), DIVERGENCES["reverse_kl"], chunk_rows=4)
    teacher = LiveTeacher(freeze(make_model("untied", 1)))
    batch = Batch(**collate(rows, 122))
    total, _ = run_inside(student, lambda b: distill(student, teacher, b, method), batch)
    loss = total / sequences * processes
    loss.backward()
    whole = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in student.named_parameters()}
    return loss.detach(), whole


def fsdp2(path: str) -> None:
    dist.init_process_group("gloo")
    student = make_model("untied")
    for layer in student.model.layers:
        fully_shard(layer)
    fully_shard(student)
    rank = dist.get_rank()
    # Rank 0 has the longer sequences: more rows, more chunks.
    loss, whole = gradients(student, samples()[2 * rank : 2 * rank + 2], 4, 2)
    dist.all_reduce(loss)
    weights = dict(full_weights(student))
    if rank == 0:
        torch.save({"loss": loss / 2, "gradients": whole, "weights": weights}, path)
    dist.destroy_process_group()


TWO_STEPS = ONE_SGD_STEP | dict(max_steps=2, learning_rate=0.1)


def ddp(folder: str, choices: str) -> None:
    for name, options in json.loads(choices).items():
        two_steps(f"{folder}/{name}", options)
    dist.barrier()
    dist.destroy_process_group()


def record_reads(teacher) -> list[bytes]:
    """The keys of the samples that a cached teacher reads from now on."""
    keys: list[bytes] = []
    if isinstance(teacher, CachedTeacher):
        read = teacher.store.read
        teacher.store.read = lambda key: keys.append(key) or read(key)
    return keys


def two_steps(path: str, choices: dict) -> None:
    """Two optimizer steps of the Trainer: 2 processes x 2 micro-batches x 2 sequences."""
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2) | choices
    pairs = make_pairs()
    evaluation = dict(eval_dataset=pairs.select(range(5)))  # an odd number: one process has more
    trainer = make_trainer(
        path, make_tokenizer(), pairs.select(range(32)), None, None, evaluation, **TWO_STEPS, **options
    )
    assert trainer.args.world_size == 2
    metrics = trainer.evaluate()
    read = record_reads(trainer.teacher)
    weights = trained_weights(trainer)
    weights = {name.removeprefix("module."): p for name, p in weights.items()}
    read = gather_object([read])
    if trainer.is_world_process_zero():
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        torch.save({"losses": losses, "weights": weights, "metrics": metrics, "read": read}, f"{path}.pt")


def served(path: str, url: str) -> None:
    """Three on-policy steps of two processes, of which one speaks to a vLLM server."""
    trainer = make_trainer(
        path, make_tokenizer(), make_pairs(), make_vllm_model(), make_vllm_model(1), **SERVED, rollout_server_urls=[url]
    )
    weights = trained_weights(trainer)
    assert (trainer.engine is not None) == trainer.is_world_process_zero()
    if trainer.is_world_process_zero():
        torch.save({name.removeprefix("module."): p for name, p in weights.items()}, f"{path}.pt")
    trainer.close()
    dist.barrier()
    dist.destroy_process_group()


SERVED = TWO_STEPS | dict(
    max_steps=3,
    per_device_train_batch_size=2,
    lmbda=1.0,
    rollout_engine="vllm_server",
    rollout_timeout=240.0,
    temperature=0.0,  # seeds go by a prompt's place among those of all processes
    max_completion_length=8,
    max_prompt_length=16,
)


if __name__ == "__main__":
    {"fsdp2": fsdp2, "ddp": ddp, "served": served}[sys.argv[1]](*sys.argv[2:])
