"""Activations that wait in the CPU's memory: the gradients are the same, and weights stay where they are."""

import dataclasses

import pytest
import torch
from helpers import VOCAB, add_lora, config, make_model, make_trainer, prompts_and_completions, trained_weights
from torch.autograd.graph import saved_tensors_hooks

import sekd.validation.inputs
from sekd.data.batch import collate
from sekd.models import causal_lm, hidden_states
from sekd.offloading import SMALLEST, OffloadActivations, offload_activations
from sekd.types import Batch
from sekd.validation.training import check_memory

CHECKPOINTING = {"gradient_checkpointing": True}
OPTIONS = {
    "plain": {},
    "checkpointing": CHECKPOINTING | {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant checkpointing": CHECKPOINTING | {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "on-policy": {"lmbda": 1.0, "gradient_accumulation_steps": 2, "position_policy": "bandit"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_a_student_learns_the_same(tmp_path, tokenizer, pairs, monkeypatch, options, adapter):
    """On a CPU, where this is refused, the activations are copied, and the copies are used."""
    monkeypatch.setattr(sekd.validation.inputs, "check_memory", lambda args: None)
    weights = []
    for on in (False, True):
        student = add_lora(make_model("untied")) if adapter else make_model("untied")
        kwargs = OPTIONS[options] | {"activation_offloading": on, "max_steps": 2}
        trainer = make_trainer(tmp_path, tokenizer, pairs, student, **kwargs)
        assert bool(causal_lm(trainer.model).base_model._forward_pre_hooks) == on
        weights.append(trained_weights(trainer))
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight), name


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_all_activations_of_the_backbone_move_and_no_others(adapter):
    model = add_lora(make_model("untied")) if adapter else make_model("untied")
    batch = Batch(**collate(prompts_and_completions()[0], 122))
    kept = []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(model, batch)
        assert (*batch.input_ids.shape, 48) in kept, "the inner layer of an MLP"
        offload_activations(model)
        kept.clear()
        hidden = hidden_states(model, batch)
        assert not kept
        torch.nn.functional.linear(hidden, torch.zeros(VOCAB, 32, requires_grad=True))
        assert kept, "a head is outside"
        kept.clear()
        with pytest.raises(IndexError):
            hidden_states(model, dataclasses.replace(batch, input_ids=batch.input_ids + VOCAB))
        model.lm_head(hidden)
        assert kept, "an error in the forward pass ends it, too"


def test_weights_and_small_tensors_stay():
    model = make_model("untied")
    offloading = OffloadActivations(model)
    with offloading:
        for tensor in (model.lm_head.weight.T, model.lm_head.weight[:64], torch.zeros(SMALLEST - 1)):
            assert offloading.pack_hook(tensor) is tensor
        activation = torch.randn(4, SMALLEST).T
        packed = offloading.pack_hook(activation)
        activation_again = offloading.unpack_hook(packed)
    assert torch.equal(activation_again, activation)
    assert activation_again.untyped_storage().data_ptr() != activation.untyped_storage().data_ptr()


def test_what_cannot_work_is_refused(tmp_path, tokenizer, pairs, monkeypatch):
    """Before any model loads: there is no student of this name."""
    with pytest.raises(ValueError, match="activation_offloading true has no effect on a CPU, whose memory holds the"):
        make_trainer(tmp_path, tokenizer, pairs, "somewhere", activation_offloading=True)
    args = config(activation_offloading=True)
    args.use_cpu = False
    check_memory(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="activation_offloading true with FSDP: the gathered weights of each layer"):
        check_memory(args)
