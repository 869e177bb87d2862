"""Optimizers, learning rates and what else TrainingArguments offers: each works, or is refused with the reason."""

import pytest
import torch
from helpers import ONE_SGD_STEP, add_lora, make_model, make_trainer, trained_weights
from transformers import TrainerCallback

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


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer, pairs, use_reentrant, adapter):
    kwargs = None if use_reentrant is None else {"use_reentrant": use_reentrant}
    plain, checkpointed = (
        trained_weights(
            make_trainer(
                tmp_path,
                tokenizer,
                pairs,
                add_lora(make_model("untied")) if adapter else make_model("untied"),
                **ONE_SGD_STEP,
                **options,
            )
        )
        for options in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs})
    )
    before = dict((add_lora(make_model("untied")) if adapter else make_model("untied")).named_parameters())
    assert any(not torch.equal(weight, before[name]) for name, weight in plain.items())
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-6)


class _SeedEachStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(7)


def test_neftune_adds_the_noise_of_transformers_to_the_embeddings_of_a_step(tmp_path, tokenizer, pairs):
    """Full KD of one step, written out: uniform noise of alpha / sqrt(T D) on each embedding [B T D]."""
    alpha, student, teacher = 5.0, make_model("untied"), make_model("untied", 1)
    options = ONE_SGD_STEP | dict(position_policy="all", train_sampling_strategy="sequential")
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        pairs.select(range(4)),
        student,
        teacher,
        dict(callbacks=[_SeedEachStep()], eval_dataset=pairs.select(range(4))),
        neftune_noise_alpha=alpha,
        **options,
    )
    batch = trainer._collate(trainer.data_collator([*trainer.train_dataset]))
    ids, valid = batch["input_ids"], batch["targets"] >= 0
    plain = make_model("untied")
    embedded = plain.get_input_embeddings()(ids)
    torch.manual_seed(7)
    bound = alpha / (embedded.shape[1] * embedded.shape[2]) ** 0.5
    noise = torch.zeros_like(embedded).uniform_(-bound, bound)
    inputs = dict(position_ids=batch["position_ids"], use_cache=False)
    q = plain(inputs_embeds=embedded + noise, **inputs).logits.log_softmax(-1)
    with torch.no_grad():
        p = teacher(input_ids=ids, **inputs).logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1) * valid
    (kl.sum(1) / valid.sum(1)).mean().backward()
    before = trainer.evaluate()
    assert trainer.evaluate() == before
    weights = trained_weights(trainer)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach() - parameter.grad, rtol=1e-5, atol=1e-6, msg=name)
    after = trainer.evaluate()
    assert trainer.evaluate() == after, "an evaluation has no noise"
