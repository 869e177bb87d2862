"""Which weights reach an engine: merged copies, or the adapter alone."""

import copy

import pytest
import torch
from helpers import EXPERTS, add_lora, make_model, make_moe
from peft.tuners.lora import LoraLayer

from sekd.on_policy.weights import check_mergeable, extract_adapter, full_weights


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
    adapted = add_lora(make_model(kind), **options)
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
        ({"trainable_token_indices": [3]}, "trainable_token_indices cannot be merged"),
    ],
)
def test_adapters_that_no_checkpoint_can_hold_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_mergeable(add_lora(make_model("tied"), **options))


def test_adapters_of_several_parameters_of_one_module_are_all_merged():
    adapted = add_lora(make_moe(), target_modules=["q_proj"], target_parameters=EXPERTS)
    plain = make_moe(seed=5)
    plain.load_state_dict(dict(full_weights(adapted)), strict=True)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(plain(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


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
def test_only_an_adapter_that_vllm_applies_alike_is_sent_alone(change):
    adapted = add_lora(make_model("untied"))
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
def test_which_adapters_are_sent_alone(options, rank):
    adapter = extract_adapter(add_lora(make_model("untied"), **options))
    assert (adapter and adapter.rank) == rank
