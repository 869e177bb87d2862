"""Reaching into models: wrappers, adapters, and the checks before training."""

import pytest
import torch
from helpers import ARCHITECTURES, add_lora, config, make_model, make_trainer

from sekd.models import causal_lm, check_head, hidden_states, load_teacher, log_dtypes, run_inside
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


def test_check_head_refuses_packing_that_leaks():
    model = make_model()
    backbone = model.base_model.forward
    # A mask beside restarting positions switches the isolation off, silently.
    model.base_model.forward = lambda **kw: backbone(**{**kw, "attention_mask": torch.ones_like(kw["input_ids"])})
    check_head(model, packed=False)
    with pytest.raises(ValueError, match="lets packed documents see each other; use attn_implementation: sdpa"):
        check_head(model, packed=True)


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
