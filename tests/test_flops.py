"""FLOPs from configurations, held to what torch counts while tiny models of realistic proportions run."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from rollouts import HFEngine
from sekd.classes import CLASS_SELECTIONS
from sekd.data.batch import Sample, collate
from sekd.distill import Method, distill
from sekd.flops import (
    BatchShape,
    Cost,
    backbone_forward,
    batch_cost,
    count_pairs,
    generation_cost,
    matrix_forward,
    optimizer_cost,
    sync_cost,
    total,
)
from sekd.losses import DIVERGENCES
from sekd.model_shape import FAMILIES, ModelShape
from sekd.models import freeze, hidden_states
from sekd.policies import make_policy
from sekd.scores import make_scoring
from sekd.teachers import LiveTeacher
from sekd.types import Batch, SparseTargets

SIZES = dict(
    vocab_size=1000,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)
OWN_SIZES = {
    "llama": dict(head_dim=16, tie_word_embeddings=True),
    "qwen3": dict(head_dim=32, tie_word_embeddings=False),
    "gemma2": dict(head_dim=24, sliding_window=16, query_pre_attn_scalar=24),
    "gemma3_text": dict(head_dim=24, sliding_window=16),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, mlp_only_layers=[1]),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "cohere": dict(num_key_value_heads=6),
    "gpt_neox": dict(num_key_value_heads=6),
}
EAGER = dict(attn_implementation="eager", experts_implementation="eager")
B, T, PROMPT = 2, 64, 16


def make_config(kind, **sizes):
    return AutoConfig.for_model(kind, **SIZES | OWN_SIZES.get(kind, {}) | sizes)


def make_pair(kind, **sizes):
    """A model, and its shape. Nothing is fused, since torch does not count the fused kernels of a CPU."""
    config = make_config(kind, **sizes)
    return AutoModelForCausalLM.from_config(config, **EAGER), ModelShape.from_config(config)


class NoModules(nullcontext):
    """In place of torch's tracker of modules, whose hooks refuse a graph's tensors where no graph is wanted."""

    parents = frozenset({"Global"})


def count_in_place(_, a, b, **kwargs):
    """addmm_, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def count(function, *args):
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: count_in_place})
    counter.mod_tracker = NoModules()
    with counter:
        function(*args)
    return counter.get_total_flops()


def make_batch():
    """Two sequences with a prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, SIZES["vocab_size"], (B, T), generator=generator).tolist()
    samples = [Sample(row, [0] * PROMPT + [1] * (T - PROMPT), number, PROMPT) for number, row in enumerate(ids)]
    return Batch.from_inputs(collate(samples, 0))


def shape_batch(fraction=1.0, **more):
    positions = B * (T - PROMPT)
    return BatchShape(B, T, positions, positions * fraction, skips_masked=False, **more)


# Shapes


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_shape_has_the_parameters_of_the_model(kind):
    config = make_config(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = sum(p.numel() for p in {*model.parameters()} if p.dim() > 1)
    shape = ModelShape.from_config(config)
    assert shape.parameters == matrices
    assert shape.trained_parameters == matrices
    assert shape.num_layers == 3


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], "all-linear", r".*\.mlp\.(up|down)_proj", ["lm_head", "up_proj"]]
)
def test_a_shape_has_the_parameters_of_the_adapter(targets):
    adapter = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model, shape = make_pair("qwen3")
    model = get_peft_model(model, adapter)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.with_adapter(adapter).trained_parameters == trained


def test_modules_to_save_are_trained():
    adapter = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    model, shape = make_pair("qwen3")
    model = get_peft_model(model, adapter)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.with_adapter(adapter).trained_parameters == trained


def test_an_unknown_architecture_or_adapter_is_an_error():
    with pytest.raises(ValueError, match="'gpt2' is not known"):
        ModelShape.from_config(AutoConfig.for_model("gpt2"))
    with pytest.raises(ValueError, match="LORA adapter with rank_pattern"):
        ModelShape.from_config(make_config("llama"), LoraConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 2}))


def test_windows_are_of_sliding_layers_alone():
    layers = dict(ModelShape.from_config(make_config("gemma2")).layers)
    assert sorted((layer.window or 0, number) for layer, number in layers.items()) == [(0, 1), (16, 2)]


# Passes


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_forward_pass(kind):
    model, shape = make_pair(kind)
    predicted = backbone_forward(shape, B, T, skips_masked=False) + matrix_forward(shape.head, B * T)
    counted = count(lambda: model(torch.randint(1000, (B, T)), use_cache=False))
    assert predicted.flops == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("window", [None, 1, 5, 64])
def test_pairs_are_the_ones_of_the_mask(window):
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    if window is not None:
        seen &= ~seen.tril(-window)
    assert count_pairs(12, window) == seen.sum()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_generation(kind):
    model, shape = make_pair(kind, eos_token_id=None)
    model.generation_config.eos_token_id = None
    engine = HFEngine(model, max_completion_length=12)
    counted = count(engine.generate, [[5] * PROMPT, [6] * PROMPT])
    predicted = generation_cost(shape, 2, PROMPT, 12, skips_masked=False)
    assert predicted.flops == pytest.approx(counted, rel=0.02)


# Whole steps


class FromCache:
    """Targets on a few classes, without a model."""

    has_logits = False

    def read(self, batch):
        number = int(batch.valid.sum())
        return {"ids": torch.arange(8).expand(number, -1), "probs": torch.full((number, 8), 1 / 8)}

    def score_inputs(self, state):
        return {}

    def logits(self, state):
        raise ValueError("a few classes only")

    def targets(self, positions, *_):
        return SparseTargets(positions.teacher["ids"], positions.teacher["probs"])


STEPS = {
    "Full KD": (dict(policy="all"), {}),
    "SE-KD 25 %": (dict(score="student_entropy"), dict(fraction=0.25, scores_student=True)),
    "random 25 %": (dict(policy="random"), dict(fraction=0.25)),
    "a score of the teacher": (dict(score="kl"), dict(fraction=0.25, scores_student=True, scores_teacher=True)),
    "RS-KD": (dict(score="student_entropy", classes="rs_kd"), dict(fraction=0.25, scores_student=True)),
    "AT-KD": (dict(policy="all", divergence="at_kd"), dict(target_passes=2)),
    "SE-KD_3X": (dict(score="student_entropy", teacher=FromCache()), dict(fraction=0.25, scores_student=True)),
}


def run_step(student, teacher, policy="top_k", score=None, divergence="forward_kl", classes="full"):
    method = Method(
        make_scoring(score) if score else None,
        make_policy(policy, 0.25),
        DIVERGENCES[divergence],
        classes=CLASS_SELECTIONS[classes],
    )
    distill(student, teacher, make_batch(), method)[0].backward()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("name", STEPS)
def test_a_step(kind, name):
    choices, shape = STEPS[name]
    student, small = make_pair(kind)
    teacher, large = make_pair(kind, num_hidden_layers=4)
    if "teacher" in choices:
        large = None
    choices = {"teacher": LiveTeacher(freeze(teacher)), **choices}
    counted = count(lambda: run_step(student.train(), **choices))
    costs = batch_cost(small, large, shape_batch(**shape))
    assert total(costs).flops == pytest.approx(counted, rel=0.02)
    assert (costs["teacher"].flops == 0) == (large is None)


ADAPTERS = {
    "attention": dict(target_modules=["q_proj", "v_proj"]),
    "all matrices": dict(target_modules="all-linear"),
    "MLP": dict(target_modules=["up_proj"]),
    "with the head": dict(target_modules=["o_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["whole student", *ADAPTERS])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_step_of_an_adapter_and_with_gradient_checkpointing(kind, name, checkpointing):
    student, small = make_pair(kind, tie_word_embeddings=False)
    teacher, large = make_pair(kind)
    if name in ADAPTERS:
        adapter = LoraConfig(r=8, task_type="CAUSAL_LM", **ADAPTERS[name])
        student, small = get_peft_model(student, adapter), small.with_adapter(adapter)
    if checkpointing:
        student.gradient_checkpointing_enable()
    counted = count(lambda: run_step(student.train(), LiveTeacher(freeze(teacher)), score="student_entropy"))
    shape = shape_batch(0.25, scores_student=True, checkpointing=checkpointing)
    assert total(batch_cost(small, large, shape)).flops == pytest.approx(counted, rel=0.02)


def test_the_backbone_alone():
    """The parts are right one by one, and not in their sum alone."""
    student, shape = make_pair("llama")
    teacher, _ = make_pair("llama")
    costs = batch_cost(shape, shape, shape_batch(0.25, scores_student=True))
    batch = make_batch()
    forward = count(hidden_states, student, batch)
    assert costs["student"].flops == pytest.approx(forward, rel=0.02)
    assert costs["teacher"].flops == pytest.approx(count(LiveTeacher(freeze(teacher)).read, batch), rel=0.02)
    loss = hidden_states(student.train(), batch).sum()
    assert costs["backward"].flops == pytest.approx(count(loss.backward), rel=0.02)
    rows = batch.valid.sum().item()
    assert costs["scoring"].flops == 2 * rows * 96 * 1000
    assert costs["loss"].flops == 4 * costs["scoring"].flops * 0.25


# Bytes


def test_bytes_and_seconds():
    assert matrix_forward(ModelShape.from_config(make_config("llama")).head, 10).bytes == 4 * (
        10 * 96 + 10 * 1000 + 96 * 1000
    )
    assert Cost(100, 10).seconds(10, 10) == 10
    assert Cost(100, 1000).seconds(10, 10) == 100
    shape = ModelShape.from_config(make_config("llama"))
    assert optimizer_cost(shape).bytes == shape.parameters * 32
    adapter = LoraConfig(r=4, target_modules=["q_proj"])
    assert sync_cost(shape).bytes == 4 * shape.parameters
    assert sync_cost(shape.with_adapter(adapter)).bytes < 0.1 * sync_cost(shape).bytes


def test_decoding_reads_every_matrix_once_a_token():
    """So its bytes, and not its FLOPs, limit it."""
    shape = ModelShape.from_config(make_config("llama"))
    one, two = (generation_cost(shape, 1, PROMPT, n).bytes for n in (1, 2))
    assert two - one == pytest.approx(4 * (shape.matrix_parameters + shape.head.parameters), rel=0.1)
