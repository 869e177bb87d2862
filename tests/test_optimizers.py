"""Optimizers, learning rates and what else TrainingArguments offers: each works, or is refused with the reason."""

import pytest
import torch
from helpers import make_model, make_trainer, trained_weights

SLOW = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "lion_8bit", "paged_adamw_8bit"]
OPTIMIZERS = ["adamw_8bit", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
SCHEDULES = {
    "cosine": {},
    "constant_with_warmup": {"warmup_steps": 2},
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-4}},
    "warmup_stable_decay": {"warmup_steps": 1, "lr_scheduler_kwargs": {"num_decay_steps": 2}},
}


def make(folder, tokenizer, pairs, **options):
    # The embedding has 4,096 numbers: bitsandbytes keeps 8 bits of the state of no smaller tensor.
    student, teacher = make_model("untied"), make_model("untied", 1)
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2) | options
    return make_trainer(folder, tokenizer, pairs, student, teacher, **options)


def check(tmp_path, tokenizer, pairs, **options):
    """All weights move, and a resumed run equals the undisturbed one."""
    before = dict(make_model("untied").named_parameters())
    whole = trained_weights(make(tmp_path / "whole", tokenizer, pairs, **options))
    assert all(weight.isfinite().all() for weight in whole.values())
    assert not [name for name, weight in whole.items() if torch.equal(weight, before[name])]
    resumed = make(tmp_path / "resumed", tokenizer, pairs, **options)
    resumed.train(str(tmp_path / "whole" / "checkpoint-2"))
    for name, weight in resumed.model.named_parameters():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_trains_and_resumes(tmp_path, tokenizer, pairs, name):
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    check(tmp_path, tokenizer, pairs, optim=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_learning_rate_schedule_trains_and_resumes(tmp_path, tokenizer, pairs, name):
    check(tmp_path, tokenizer, pairs, lr_scheduler_type=name, **SCHEDULES[name])
