"""Reaching into models: wrappers, adapters, and the checks before training."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from helpers import ARCHITECTURES, SMALL, add_lora, config, make_model, make_trainer
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from sekd.models import causal_lm, check_head, hidden_states, load_model, load_teacher, log_dtypes, run_inside
from sekd.types import Batch


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_check_head_accepts_the_architectures_that_sekd_knows(kind):
    check_head(make_model(kind), packed=True)
    check_head(make_model(kind).bfloat16(), packed=True)


def test_check_head_refuses_logits_that_it_does_not_understand():
    model = make_model()
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="sekd does not support Qwen3ForCausalLM: its logits differ by"):
        check_head(model, packed=False)


def test_check_head_refuses_a_model_of_zeros():
    """It is what RAM-efficient loading leaves in all processes but the first."""
    model = make_model("untied")
    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.raises(ValueError, match="LlamaForCausalLM gives every class the same logit"):
        check_head(model, packed=False)


def let_documents_leak(model):
    """Switch their isolation off. A mask beside restarting positions does so, silently."""
    backbone = model.base_model.forward
    model.base_model.forward = lambda **kw: backbone(**{**kw, "attention_mask": torch.ones_like(kw["input_ids"])})
    return model


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_check_head_refuses_packing_that_leaks(kind):
    model = let_documents_leak(make_model(kind))
    check_head(model, packed=False)
    with pytest.raises(ValueError, match="lets packed documents see each other; use attn_implementation: sdpa"):
        check_head(model, packed=True)


def make_mixture(kind, seed):
    torch.manual_seed(seed)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)).eval()
    experts = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **experts, head_dim=16)).eval()


@pytest.mark.parametrize("kind", ["qwen3", "mixtral"])
def test_check_head_accepts_mixtures_of_experts(kind):
    """Other tokens before a document change how many tokens an expert has, and so the last bits of its products."""
    for seed in range(12):
        model = make_mixture(kind, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and seed % 2:  # as far from flat as a trained model, or freshly initialised
                    parameter.normal_(std=0.3)
        check_head(model, packed=True)
        check_head(copy.deepcopy(model).bfloat16(), packed=True)
        with pytest.raises(ValueError, match="lets packed documents see each other"):
            check_head(let_documents_leak(model), packed=True)


def test_run_inside_goes_through_the_wrapper_and_leaves_no_trace():
    inner, passed, seen = torch.nn.Linear(2, 2), [], []
    wrapper = torch.nn.DataParallel(inner)
    wrapper.register_forward_pre_hook(lambda *_: passed.append(1))

    def function(x):
        seen.append(x)
        return inner(x).sum()

    x = torch.ones(1, 2)
    torch.testing.assert_close(run_inside(wrapper, function, x), inner(x).sum())
    assert len(passed) == len(seen) == 1
    assert "forward" not in vars(inner)

    def fails(x):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        run_inside(wrapper, fails, x)
    assert "forward" not in vars(inner)


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_process_that_is_not_the_first_loads_weights_and_not_zeros(tmp_path, monkeypatch, one_process_group):
    """As in the second process of `accelerate launch --use_fsdp`."""
    model = make_model("untied")
    model.save_pretrained(tmp_path)
    efficient = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "LOCAL_RANK": "1"}
    for name, value in efficient.items():
        monkeypatch.setenv(name, value)
    assert not AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.any(), "otherwise this tests nothing"
    loaded = load_model(str(tmp_path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert {name: os.environ[name] for name in efficient} == efficient


def test_fsdp2_rounds_no_value_that_passes_it(one_process_group):
    """Accelerate's policy for bf16 converts what the wrapped forward returns, and the gradient that comes back."""
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    inner = fully_shard(torch.nn.Linear(4, 1, bias=False), mp_policy=mixed)
    assert inner(torch.ones(1, 4)).dtype == torch.bfloat16
    exact = 1 / 3 + torch.arange(3, dtype=torch.float64)

    def function(x):
        loss = inner(x).float().sum() / 3
        return loss + 100.3 - loss.detach(), {"sums": exact, "count": torch.tensor(257)}

    loss, side = run_inside(inner, function, torch.ones(1, 4))
    assert loss.item() == torch.tensor(100.3).item()
    assert torch.equal(side["sums"], exact)
    assert side["count"].item() == 257
    loss.backward()
    gradient = inner.weight.grad.full_tensor()
    torch.testing.assert_close(gradient, torch.full((1, 4), 1 / 3).bfloat16().float())


def test_a_lora_model_gives_its_own_hidden_states():
    adapted = add_lora(make_model("untied"))
    ids = torch.arange(10)[None]
    batch = Batch(ids, ids, ids, torch.tensor([0]))
    own = adapted(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden_states(adapted, batch), own)
    assert causal_lm(adapted).lm_head is adapted.base_model.model.lm_head


def test_the_log_says_once_what_each_model_computes_in(tmp_path, tokenizer, pairs, monkeypatch):
    lines = []
    monkeypatch.setattr("sekd.models.logger.warning", lines.append)
    trainer = make_trainer(tmp_path, tokenizer, pairs, lmbda=1.0)
    trainer.train()
    assert lines == ["precision: student float32 weights, computing in float32; teacher float32; rollouts float32"]
    log_dtypes(make_model().bfloat16(), None, config(bf16=True, use_cpu=True), generates=False)
    assert lines[1] == "precision: student bfloat16 weights, computing in bfloat16; teacher cache"


@pytest.mark.parametrize("cache", [None, "c"])
def test_the_hardware_chooses_the_teachers_dtype(tmp_path, cache, monkeypatch):
    make_model().save_pretrained(tmp_path)
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert load_teacher(str(tmp_path), config(use_cpu=True, teacher_cache=cache)).dtype == dtype
    assert load_teacher(str(tmp_path), config(teacher_dtype="float16", teacher_cache=cache)).dtype == torch.float16
