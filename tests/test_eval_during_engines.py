"""Evaluation in training with a real vLLM, with a server, and in two processes."""

import importlib.util
import json

import pytest
import torch
from distributed_worker import TWO_STEPS
from evaluation_helpers import write_tasks
from helpers import make_model, make_trainer, make_vllm_model, run_two_processes
from rollout_helpers import make_lora
from serving import Served, SmallServer
from transformers import set_seed

from rollouts import RolloutConfigError

pytest.importorskip("lm_eval", reason="lm-eval is not installed here")

pytestmark = pytest.mark.slow
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")

EVERY_STEP = dict(eval_strategy="steps", eval_steps=1, eval_on_start=True)
VLLM = dict(lmbda=1.0, rollout_engine="vllm", vllm_enforce_eager=True, rollout_batches=2, max_steps=4)
VLLM |= dict(max_completion_length=8, max_prompt_length=16)


@pytest.fixture
def tasks(tmp_path):
    return dict(eval_suite=["arc_easy", "gsm8k"], eval_data_dir=[write_tasks(tmp_path / "tasks")], eval_limit=6)


def train(folder, tokenizer, pairs, student, **options):
    """The losses and weights that a run leaves, and its evaluations."""
    trainer = make_trainer(folder, tokenizer, pairs, student, make_vllm_model(1), save_rollouts=True, **options)
    set_seed(0)
    trainer.train()
    logs = trainer.state.log_history
    losses = [(log["loss"], log["grad_norm"], log["entropy"]) for log in logs if "loss" in log]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return losses, weights, [log for log in logs if "eval_gsm8k_math_verify" in log]


@needs_vllm
@pytest.mark.xdist_group("vLLM in process")
@pytest.mark.parametrize("make_student", [make_vllm_model, lambda: make_lora(lora_dropout=0.3)], ids=["whole", "LoRA"])
def test_a_run_with_vllm_is_the_run_without_evaluations(tmp_path, tokenizer, pairs, tasks, make_student):
    plain = train(tmp_path / "plain", tokenizer, pairs, make_student(), **VLLM)
    evaluated = train(tmp_path / "run", tokenizer, pairs, make_student(), **VLLM, **EVERY_STEP, **tasks)
    assert evaluated[0] == plain[0]
    assert len(plain[0]) == 4
    assert all(torch.equal(evaluated[1][name], weight) for name, weight in plain[1].items())
    rollouts = [(tmp_path / run / "rollouts.jsonl").read_text() for run in ("plain", "run")]
    assert rollouts[0] == rollouts[1]
    assert len(evaluated[2]) == 5


@needs_vllm
@pytest.mark.xdist_group("vLLM in process")
def test_vllm_gives_the_outputs_that_transformers_gives(tmp_path, tokenizer, pairs, tasks):
    """Log-likelihoods are the trainer's own; outputs agree up to ties of float32."""
    outputs = {}
    for engine in ("vllm", "hf"):
        options = VLLM | dict(rollout_engine=engine) | tasks
        trainer = make_trainer(tmp_path / engine, tokenizer, pairs, make_vllm_model(), make_vllm_model(1), **options)
        seen = outputs.setdefault(engine, [])
        ask = trainer.schedule.generate_with
        trainer.schedule.generate_with = lambda p, s, a=ask, k=seen: k.extend(a(p, s)) or k[-len(p) :]
        metrics = trainer.evaluate()
        assert metrics["eval_gsm8k_math_verify"] == 0
        trainer.close()
    for ours, theirs in zip(outputs["vllm"], outputs["hf"], strict=True):
        assert ours.prompt_ids == theirs.prompt_ids
        assert ours.completion_ids[:8] == theirs.completion_ids[:8]


def test_a_server_with_too_short_a_context_is_refused(tmp_path, tokenizer, pairs, tasks):
    server = SmallServer(Served(make_vllm_model()))
    options = VLLM | dict(rollout_engine="vllm_server", rollout_server_urls=[server.url])
    trainer = make_trainer(tmp_path / "run", tokenizer, pairs, make_vllm_model(), None, **options, **tasks)
    needed = trainer.schedule.evaluation_context
    message = rf"has a context of 64 tokens, .* take up to {needed}; start it with --max-model-len {needed}"
    with pytest.raises(RolloutConfigError, match=message):
        trainer.evaluate()
    server.shutdown()


@pytest.mark.xdist_group("two processes")
def test_two_processes_have_the_scores_of_one(tmp_path, tokenizer, pairs, tasks):
    """And the weights of two processes that evaluate nothing."""
    choices = {"plain": {}, "ddp": tasks | EVERY_STEP, "fsdp2": tasks | EVERY_STEP | {"fsdp2_efficient_loading": True}}
    choices["fsdp2 plain"] = {"fsdp2_efficient_loading": True}
    run_two_processes("evaluated", str(tmp_path), json.dumps(choices))
    found = {name: torch.load(tmp_path / f"{name}.pt") for name in choices}
    held_out = dict(eval_dataset=pairs.select(range(5)))
    trainer = make_trainer(
        tmp_path / "one",
        tokenizer,
        pairs.select(range(32)),
        make_model("untied"),
        None,
        held_out,
        **TWO_STEPS | dict(per_device_train_batch_size=8),
        **tasks | EVERY_STEP,
    )
    trainer.train()
    expected = [log for log in trainer.state.log_history if "eval_arc_easy_acc" in log]
    for name, plain in (("ddp", "plain"), ("fsdp2", "fsdp2 plain")):
        for ours, one in zip(found[name]["evaluations"], expected, strict=True):
            assert ours.keys() == one.keys()
            for key, value in one.items():
                assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
        assert found[name]["metrics_differ"] == 0, "every process has the same numbers"
        assert found[name]["losses"] == found[plain]["losses"]
        for key, weight in found[plain]["weights"].items():
            assert torch.equal(found[name]["weights"][key], weight), key
