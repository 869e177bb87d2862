"""Reaching into models: wrappers, adapters, and the checks before training."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES, make_model
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from sekd.models import causal_lm, check_head, hidden_states, run_inside
from sekd.on_policy.weights import check_mergeable, extract_adapter, full_weights
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
    with pytest.raises(ValueError, match="Qwen3ForCausalLM are not those of its LM head"):
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


def lora(model, **options):
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], **options}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name or "magnitude" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return adapted.eval()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("untied", {}),
        ("tied", {}),
        ("untied", {"modules_to_save": ["lm_head"]}),
        ("untied", {"use_rslora": True}),
        ("untied", {"use_dora": True}),
        ("untied", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
        ("bias", {"target_modules": ["q_proj", "fc1"], "lora_bias": True}),
    ],
)
def test_full_weights_merges_copies_of_an_adapter(kind, options):
    adapted = lora(make_model(kind), **options)
    check_mergeable(adapted)
    before = copy.deepcopy(adapted.state_dict())
    plain = make_model(kind, seed=5)
    plain.load_state_dict(dict(full_weights(adapted)), strict=True)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(plain(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    for _ in range(100):
        assert sum(1 for _ in full_weights(adapted)) == len(plain.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items()), "merging drifted"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, "the adapter changes embed_tokens, but this student has one weight"),
        ({"target_modules": ["q_proj", "lm_head"]}, "the adapter changes lm_head"),
        ({"modules_to_save": ["embed_tokens"]}, "the adapter changes embed_tokens"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices cannot be sent"),
    ],
)
def test_adapters_that_no_checkpoint_can_hold_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_mergeable(lora(make_model("tied"), **options))


def test_a_lora_model_gives_its_own_hidden_states():
    adapted = lora(make_model("untied"))
    ids = torch.arange(10)[None]
    batch = Batch(ids, ids, ids, torch.tensor([0]))
    own = adapted(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden_states(adapted, batch), own)
    assert causal_lm(adapted).lm_head is adapted.base_model.model.lm_head


def unfreeze_norms(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "norm" in name)


def each_layer(method, *arguments):
    def change(model):
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                getattr(layer, method)(*arguments)

    return change


@pytest.mark.parametrize(
    "change",
    [unfreeze_norms, each_layer("scale_layer", 0.5), each_layer("merge"), lambda m: m.disable_adapter_layers()],
    ids=["norms train too", "scaled", "merged", "off"],
)
def test_only_what_vllm_computes_alike_goes_as_an_adapter(change):
    adapted = lora(make_model("untied"))
    assert extract_adapter(adapted).rank == 4
    change(adapted)
    assert extract_adapter(adapted) is None


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"rank_pattern": {"q_proj": 12}, "alpha_pattern": {"q_proj": 3}, "target_modules": ["q_proj", "v_proj"]}, 12),
        ({"use_rslora": True, "init_lora_weights": "gaussian", "target_modules": ["q_proj"]}, 4),
        ({"use_dora": True}, None),
        ({"bias": "lora_only"}, None),
        ({"target_modules": ["q_proj", "lm_head"]}, None),
        ({"target_modules": ["embed_tokens"]}, None),
        ({"init_lora_weights": "pissa"}, None),
        ({"modules_to_save": ["lm_head"]}, None),
    ],
    ids=str,
)
def test_which_adapters_go_alone(options, rank):
    found = extract_adapter(lora(make_model("untied"), **options))
    assert (found and found.rank) == rank
