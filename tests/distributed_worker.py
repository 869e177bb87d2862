"""Run under torchrun by test_trainer_distributed.py; writes what rank 0 found to a file."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from helpers import (
    ONE_SGD_STEP,
    add_lora,
    keep_engine,
    make_model,
    make_pairs,
    make_tokenizer,
    make_trainer,
    make_vllm_model,
    trained_weights,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sekd.cache.teacher import CachedTeacher
from sekd.on_policy.weights import full_weights
from sekd.policies import PositionPolicy

LONG_RUNS = {"20 steps, ddp": {}, "20 steps, fsdp2": {"fsdp2_efficient_loading": False}}
RESUMED = {
    "shards": {"position_policy": "gls"},
    "shards, tied, on-policy": {"kind": "tied", "lmbda": 1.0, "rollout_batches": 4, "max_prompt_length": 16},
    "shards of an adapter": {"adapter": True},
    "whole weights": {"state_dict_type": "FULL_STATE_DICT"},
}
"""Runs in FSDP2 that resume. Where ``state_dict_type`` is not said, it is accelerate's default, SHARDED_STATE_DICT."""
TWO_STEPS = ONE_SGD_STEP | dict(max_steps=2, learning_rate=0.1)


def trained(folder: str, choices: str) -> None:
    for name, options in json.loads(choices).items():
        two_steps(f"{folder}/{name}", options)
    for name, options in LONG_RUNS.items():
        twenty_steps(f"{folder}/{name}", per_device_train_batch_size=4, **options)
    resume_in_second_epoch(folder)
    for name, options in RESUMED.items():
        resume_fsdp2(f"{folder}/{name}", **options)
    refuse_other_weights(folder)
    dist.barrier()
    dist.destroy_process_group()


def record_reads(teacher) -> list[bytes]:
    """The keys of the samples that a cached teacher reads from now on."""
    keys: list[bytes] = []
    if isinstance(teacher, CachedTeacher):
        read = teacher.store.read
        teacher.store.read = lambda key: keys.append(key) or read(key)
    return keys


def use_fsdp2(trainer, efficient_loading: bool, **options) -> None:
    """Let accelerate wrap the student in FSDP2, as it does on GPUs. On a CPU it would choose DDP."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=efficient_loading,
        **options,
    )
    trainer.accelerator.state.fsdp_plugin = plugin
    # accelerate sets both: each new AcceleratorState copies the second. The next configuration resets them.
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def two_steps(path: str, choices: dict) -> None:
    """Two optimizer steps of the Trainer: 2 processes x 2 micro-batches x 2 sequences."""
    AcceleratorState._reset_state()  # of a run in FSDP2
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2) | choices
    kind, efficient_loading = options.pop("kind", "untied"), options.pop("fsdp2_efficient_loading", None)
    pairs = make_pairs()
    evaluation = dict(eval_dataset=pairs.select(range(5)))  # an odd number: one process has more
    trainer = make_trainer(
        path, make_tokenizer(), pairs.select(range(32)), make_model(kind), None, evaluation, **TWO_STEPS, **options
    )
    assert trainer.args.world_size == 2
    if efficient_loading is not None:
        use_fsdp2(trainer, efficient_loading)
    read = record_reads(trainer.teacher)
    trainer.train()
    assert isinstance(trainer.model, FSDPModule) == (efficient_loading is not None)
    if trainer.args.teacher_fsdp:
        sharded = {name for name, p in trainer.teacher.model.named_parameters() if isinstance(p, DTensor)}
        whole = {name for name, _ in trainer.teacher.model.named_parameters()} - sharded
        assert whole == {"model.embed_tokens.weight", "lm_head.weight"}
    weights = {name: tensor.clone() for name, tensor in full_weights(trainer.model)}
    metrics = trainer.evaluate()
    read = gather_object([read])
    if trainer.is_world_process_zero():
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        results = {"losses": losses, "weights": weights, "metrics": metrics, "read": read}
        torch.save({**results, "logs": trainer.state.log_history}, f"{path}.pt")


@contextmanager
def recording_choices(trainer) -> Iterator[dict[tuple[int, int], list[int]]]:
    """By step and sample, which of its valid positions this process chose."""
    chosen: dict[tuple[int, int], list[int]] = {}
    observe = PositionPolicy.observe

    def record(policy, batch, mask, state):
        for sample, marks in zip(batch.sample_ids.tolist(), mask.split(batch.valid.sum(1).tolist()), strict=True):
            chosen[trainer.state.global_step, sample] = marks.nonzero()[:, 0].tolist()

    PositionPolicy.observe = record
    yield chosen
    PositionPolicy.observe = observe


def twenty_steps(path: str, **options) -> None:
    """Steps of AdamW, whose losses and choices are saved, and the student in its folder."""
    AcceleratorState._reset_state()
    efficient_loading = options.pop("fsdp2_efficient_loading", None)
    trainer = make_trainer(path, make_tokenizer(), make_pairs(), max_steps=20, learning_rate=1e-3, **options)
    if efficient_loading is not None:
        use_fsdp2(trainer, efficient_loading)
    with recording_choices(trainer) as chosen:
        trainer.train()
    trainer.save_model()
    of_all = gather_object([chosen])
    if trainer.is_world_process_zero():
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        torch.save({"losses": losses, "chosen": of_all}, f"{path}.pt")


def resume_in_second_epoch(folder: str) -> None:
    """Two rollouts a prompt, in epochs of 4 steps: an undisturbed run, and the same run resumed after step 6."""
    AcceleratorState._reset_state()
    options = ONE_SGD_STEP | dict(lmbda=1.0, rollouts_per_prompt=2, max_prompt_length=16, per_device_train_batch_size=2)
    saving = dict(max_steps=8, learning_rate=0.1, save_strategy="steps", save_steps=6, save_rollouts=True)
    for name, checkpoint in (("undisturbed", None), ("resumed", f"{folder}/undisturbed/checkpoint-6")):
        trainer = make_trainer(f"{folder}/{name}", make_tokenizer(), make_pairs().select(range(8)), **options | saving)
        trainer.train(checkpoint)


def resume_fsdp2(folder: str, kind: str = "untied", adapter: bool = False, **options) -> None:
    """Four steps of AdamW in FSDP2: an undisturbed run, and the same run resumed after step 2."""
    plugin = {name: options.pop(name) for name in ("state_dict_type",) if name in options}
    options |= dict(max_steps=4, learning_rate=1e-2, save_strategy="steps", save_steps=2)
    for name, checkpoint in (("undisturbed", None), ("resumed", f"{folder}/undisturbed/checkpoint-2")):
        AcceleratorState._reset_state()
        student = add_lora(make_model(kind)) if adapter else make_model(kind)
        trainer = make_trainer(f"{folder}/{name}", make_tokenizer(), make_pairs(), student, **options)
        use_fsdp2(trainer, False, **plugin)
        trainer.train(checkpoint)
        trainer.save_model()
        weights = {n: tensor.clone() for n, tensor in full_weights(trainer.model)}
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        if trainer.is_world_process_zero():
            torch.save({"losses": losses, "weights": weights}, f"{folder}/{name}.pt")


def refuse_other_weights(folder: str) -> None:
    """Each process writes the error that it raises for a teacher that the other process has with other weights."""
    rank = dist.get_rank()
    try:
        make_trainer(folder, make_tokenizer(), make_pairs(), teacher=make_model("untied", 1 + rank))
    except ValueError as error:
        Path(folder, f"refusal_{rank}.txt").write_text(str(error))


def evaluated(folder: str, choices: str) -> None:
    """Two steps with and without evaluations; what the processes found."""
    for name, options in json.loads(choices).items():
        AcceleratorState._reset_state()
        efficient_loading = options.pop("fsdp2_efficient_loading", None)
        pairs = make_pairs()
        held_out = dict(eval_dataset=pairs.select(range(5))) if "eval_suite" in options else {}
        settings = TWO_STEPS | dict(per_device_train_batch_size=2, gradient_accumulation_steps=2) | options
        trainer = make_trainer(
            f"{folder}/{name}", make_tokenizer(), pairs.select(range(32)), None, None, held_out, **settings
        )
        if efficient_loading is not None:
            use_fsdp2(trainer, efficient_loading)
        trainer.train()
        weights = {n: tensor.clone() for n, tensor in full_weights(trainer.model)}
        logs = trainer.state.log_history
        evaluations = [log for log in logs if "eval_arc_easy_acc" in log]
        losses = [log["loss"] for log in logs if "loss" in log]
        of_all = gather_object([trainer.evaluate() if evaluations else {}])
        differ = sum(metrics != of_all[0] for metrics in of_all)
        found = {"losses": losses, "weights": weights, "evaluations": evaluations, "metrics_differ": differ}
        if trainer.is_world_process_zero():
            torch.save(found, f"{folder}/{name}.pt")
    dist.barrier()
    dist.destroy_process_group()


def served(path: str, url: str) -> None:
    """Three on-policy steps of two processes, of which one speaks to a vLLM server."""
    trainer = make_trainer(
        path, make_tokenizer(), make_pairs(), make_vllm_model(), make_vllm_model(1), **SERVED, rollout_server_urls=[url]
    )
    weights = trained_weights(keep_engine(trainer))
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
    {"trained": trained, "served": served, "evaluated": evaluated}[sys.argv[1]](*sys.argv[2:])
