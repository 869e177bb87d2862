"""What a step does, in exact numbers: a change that makes a step do more fails here. No time is measured.

Each number stands beside its reason. Lower it when a step does less.
"""

from collections import Counter
from functools import partial

import pytest
import torch
from cache_helpers import config
from datasets import Dataset
from helpers import SMALL, make_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from rollouts import ENGINES, HFEngine
from sekd.cache.build import build_cache
from sekd.cache.readers import LocalReader
from sekd.data.prepare import prepare
from sekd.models import freeze

aten = torch.ops.aten
CLASSES = 131
"""V. No other size of the models or batches equals it, so that a product with the head is known by its shape."""

STUDENT_SIZE, TEACHER_SIZE = 32, 40
PRODUCTS = {aten.mm: 0, aten.addmm: 1, aten.addmm_: 1}
"""Matrix products, with the place of the first factor among their arguments."""

B, PROMPT, TARGETS = 4, 4, 61
"""Sequences of a batch, and tokens of each prompt and each completion, EOS included."""

N = B * TARGETS
CHOSEN = B * 13  # 20 % of 61, rounded up
LENGTH = 12  # of a rollout
LIMITS = dict(max_length=80, max_prompt_length=20)
CHUNK = 128  # positions of a product on a CPU


class WorkCounter(TorchDispatchMode):
    """Counts while it is active: products with the heads, passes of the backbones, and waits for the device.

    ``student_tokens`` and ``teacher_tokens`` went through a backbone, padding included.
    ``student_head`` and ``teacher_head`` are positions through a head, ``_calls`` the products. Gradients count on
    their own: of each position one product for its hidden state and one for the head's weight.
    """

    def __init__(self, student, teacher):
        super().__init__()
        self.counts, self.prefix, self.is_active = Counter(), "", False
        for name, model in (("student", student), ("teacher", teacher)):
            model.base_model.register_forward_hook(partial(self.count_pass, name), with_kwargs=True)

    def __enter__(self):
        self.is_active = True
        return super().__enter__()

    def __exit__(self, *error):
        self.is_active = False
        return super().__exit__(*error)

    def count_pass(self, name, module, args, kwargs, output):
        self.add(f"{name}_passes")
        self.add(f"{name}_tokens", kwargs["input_ids"].numel())

    def add(self, name, number=1):
        if self.is_active:
            self.counts[self.prefix + name] += number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        if packet in PRODUCTS:
            first = PRODUCTS[packet]
            self.count_product(*args[first].shape, args[first + 1].shape[1])
        by_mask = packet is aten.index and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or packet in (aten._local_scalar_dense, aten.nonzero, aten.masked_select):
            self.add("waits")
        return function(*args, **(kwargs or {}))

    def count_product(self, rows, inner, columns):
        """A product with a head has two of the head's sizes. The third is a number of positions."""
        sizes = {rows, inner, columns}
        for name, size in (("student", STUDENT_SIZE), ("teacher", TEACHER_SIZE)):
            if {CLASSES, size} <= sizes:
                kind = "head" if inner == size else "head_gradients"
                self.add(f"{name}_{kind}", rows * inner * columns // (CLASSES * size))
                self.add(f"{name}_{kind}_calls")


def make_student():
    """A student that never ends a rollout: the bias of its head forbids EOS."""
    torch.manual_seed(0)
    sizes = {"vocab_size": CLASSES, "hidden_size": STUDENT_SIZE}
    student = PhiForCausalLM(PhiConfig(**SMALL | sizes))
    with torch.no_grad():
        student.lm_head.bias[SMALL["eos_token_id"]] = -1e4
    return student


def make_teacher():
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": CLASSES, "hidden_size": TEACHER_SIZE}))


def make_data(prompts=(PROMPT,) * 2 * B):
    """Rows whose prompts have these numbers of tokens."""

    def text(start, length):
        return " ".join(f"w{(start + i) % 100}" for i in range(length))

    return Dataset.from_list(
        [{"prompt": text(i, n), "completion": text(7 * i, TARGETS - 1)} for i, n in enumerate(prompts)]
    )


def run_step(folder, tokenizer, monkeypatch, data=None, **options):
    """The counts of one optimizer step through the trainer: from its samples to the end of its backward pass."""
    student, teacher = make_student(), make_teacher()
    counter = WorkCounter(student, teacher)

    class CountedEngine(HFEngine):
        def generate(self, prompts):
            counter.prefix = "generation_"
            rollouts = super().generate(prompts)
            counter.prefix = ""
            counter.add("generated_tokens", sum(len(rollout.completion_ids) for rollout in rollouts))
            return rollouts

        def sync_weights(self, model, step):
            counter.add("weight_syncs")
            super().sync_weights(model, step)

    monkeypatch.setitem(ENGINES, "hf", CountedEngine)
    options = dict(max_steps=1, max_completion_length=LENGTH, record_selection=0, **LIMITS) | options
    trainer = make_trainer(folder / "run", tokenizer, data or make_data(), student, teacher, **options)
    for name in ("get_batch_samples", "training_step"):
        monkeypatch.setattr(trainer, name, counting(counter, getattr(trainer, name)))
    trainer.train()
    return dict(counter.counts)


def counting(counter, function):
    def run(*args, **kwargs):
        with counter:
            return function(*args, **kwargs)

    return run


def head_work(model, scored, chosen, with_gradients=True):
    """What a head does: positions to score, in chunks; positions of the loss, in chunks, with two gradients each."""
    calls = -(-scored // CHUNK) + -(-chosen // CHUNK)
    work = {f"{model}_head": scored + chosen, f"{model}_head_calls": calls}
    if with_gradients:
        calls = 2 * -(-chosen // CHUNK)
        work |= {f"{model}_head_gradients": 2 * chosen, f"{model}_head_gradients_calls": calls}
    return work


def backbone_work(tokens, models=("student", "teacher")):
    """One pass of each backbone."""
    return {f"{model}_{name}": number for model in models for name, number in (("passes", 1), ("tokens", tokens))}


GENERATION = {
    "weight_syncs": 1,
    "generated_tokens": B * LENGTH,
    "generation_student_passes": LENGTH,
    "generation_student_tokens": B * (PROMPT + LENGTH - 1),
    "generation_student_head": B * LENGTH,
    "generation_student_head_calls": LENGTH,
}
"""Prompts are read in one pass, which gives the first token. The head computes one position a pass."""

ROLLED = B * LENGTH
ROLLED_CHOSEN = B * 3  # 20 % of 12, rounded up

STEPS = {
    "Full KD": (
        dict(position_policy="all"),
        head_work("student", 0, N) | head_work("teacher", 0, N, with_gradients=False),
        16,
    ),
    "SE-KD": ({}, head_work("student", N, CHOSEN) | head_work("teacher", 0, CHOSEN, with_gradients=False), 18),
    "random": (
        dict(position_policy="random"),
        head_work("student", 0, CHOSEN) | head_work("teacher", 0, CHOSEN, with_gradients=False),
        16,
    ),
    "a score of the teacher": (
        dict(position_score="kl"),
        head_work("student", N, CHOSEN) | head_work("teacher", N, CHOSEN, with_gradients=False),
        18,
    ),
    "on-policy": (
        dict(lmbda=1.0),
        head_work("student", ROLLED, ROLLED_CHOSEN)
        | head_work("teacher", 0, ROLLED_CHOSEN, with_gradients=False)
        | GENERATION,
        18,
    ),
    "on-policy, with the sampler's scores": (
        dict(lmbda=1.0, score_source="rollout"),
        # The first step measures the agreement on one sequence.
        head_work("student", LENGTH, ROLLED_CHOSEN)
        | head_work("teacher", 0, ROLLED_CHOSEN, with_gradients=False)
        | GENERATION,
        20,
    ),
}
"""Options, the work of the step, and at most how often it waits for the device."""


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_no_more(tmp_path, tokenizer, monkeypatch, name):
    options, work, waits = STEPS[name]
    counts = run_step(tmp_path, tokenizer, monkeypatch, **options)
    counts.pop("generation_waits", None)
    assert counts.pop("waits") <= waits
    completion = LENGTH if "lmbda" in options else TARGETS
    assert counts == work | backbone_work(B * (PROMPT + completion))


def test_a_step_from_a_cache_has_no_teacher(tmp_path, tokenizer, monkeypatch):
    """SE-KD_3X: chosen samples, student entropy, targets on a few classes."""
    folder = str(tmp_path / "cache")
    args = config(folder, **LIMITS)
    reader = LocalReader(freeze(make_teacher()), CLASSES, args)
    build_cache(prepare(make_data(), tokenizer, args), reader, tokenizer, args, folder, 8)
    options = dict(teacher_cache=folder, class_samples=16, sample_fraction=0.5)
    counts = run_step(tmp_path, tokenizer, monkeypatch, **options)
    assert counts.pop("waits") <= 18
    assert counts == head_work("student", N, CHOSEN) | backbone_work(B * (PROMPT + TARGETS), ["student"])


def test_more_micro_batches_and_rounds_do_no_more(tmp_path, tokenizer, monkeypatch):
    """Accumulation runs the models once a micro-batch, and a round of two steps generates once, with one sync."""
    options = dict(lmbda=1.0, max_steps=2, rollout_batches=2, per_device_train_batch_size=2)
    counts = run_step(tmp_path, tokenizer, monkeypatch, gradient_accumulation_steps=2, **options)
    assert counts["weight_syncs"] == 1
    assert counts["generated_tokens"] == 2 * B * LENGTH
    assert counts["generation_student_passes"] == LENGTH
    assert counts["student_passes"] == counts["teacher_passes"] == 4
    assert counts["student_head"] == 2 * (ROLLED + ROLLED_CHOSEN)


def test_rollouts_of_similar_length_share_a_micro_batch(tmp_path, tokenizer, monkeypatch):
    """Each micro-batch is as wide as its longest rollout: those with prompts of 9 and 8 tokens, and of 3 and 2."""
    options = dict(lmbda=1.0, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    options["train_sampling_strategy"] = "sequential"
    counts = run_step(tmp_path, tokenizer, monkeypatch, make_data([9, 2, 8, 3]), **options)
    assert counts["student_tokens"] == counts["teacher_tokens"] == 2 * (9 + LENGTH) + 2 * (3 + LENGTH)
