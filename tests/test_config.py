"""What the fields become: defaults that follow the mode, scores, options."""

import pytest
import torch
from helpers import config

from sekd import SEKDConfig
from sekd.models import compute_dtype


def test_the_divergence_follows_the_mode():
    assert config(lmbda=0.0).divergence == "forward_kl"
    assert config(lmbda=0.5).divergence == "reverse_kl"
    assert config(lmbda=1.0, divergence="jsd").divergence == "jsd"
    assert config(lmbda=1.0, class_selection="rs_kd").divergence == "forward_kl"
    replayed = config(lmbda=1.0, rollouts="rollouts.jsonl")
    assert (replayed.lmbda, replayed.divergence) == (0, "reverse_kl")
    assert config(rollouts="rollouts.jsonl").divergence == "forward_kl"


def test_scores_are_read_only_where_the_policy_looks_at_them():
    assert config().scoring.names == ("student_entropy",)
    assert config(position_fraction=1.0).scoring is None
    assert config(position_policy="random").scoring is None
    assert config(position_policy="tip").scoring.names == ("student_entropy", "reverse_kl")
    mixed = config(position_score='{"kl": 0.5, "student_ce": 2}', score_normalization="minmax").scoring
    assert (mixed.names, mixed.weights, mixed.normalization) == (("kl", "student_ce"), (0.5, 2.0), "minmax")


def test_a_mapping_is_read_as_yaml():
    assert config(position_score="{kl: 1e-1, student_ce: 2}").scoring.weights == (0.1, 2.0)


def test_options_reach_their_policy_and_divergence():
    assert config(position_policy="pos_rs", pos_rs_exponent=0.5).policy_options == {"exponent": 0.5, "coverage": 0.0}
    assert config(position_policy="bandit").policy_options == {"alpha": 1.0, "ridge": 1.0}
    assert config(position_policy="top_k").policy_options == {}
    assert config(divergence="decoupled_kl").divergence_options == {"alpha": 1.0, "beta": 8.0}


@pytest.mark.parametrize("is_native", [True, False])
def test_the_hardware_chooses_dtypes_unless_the_recipe_does(is_native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    chosen, dtype = config(use_cpu=True), "bfloat16" if is_native else "float32"
    assert (chosen.bf16, chosen.teacher_dtype, compute_dtype(chosen)) == (is_native, dtype, getattr(torch, dtype))
    assert config(use_cpu=True, bf16=False).teacher_dtype == dtype
    assert config(use_cpu=True, teacher_dtype="auto").teacher_dtype == "auto"
    assert config(use_cpu=True, bf16=not is_native).bf16 is not is_native
    assert config(use_cpu=True, teacher_cache="c").teacher_dtype is None, "no teacher is loaded"


def test_prompts_leave_room_for_completions():
    assert (config().max_prompt_length, config(max_length=4096).max_prompt_length) == (512, 512)
    assert config(max_length=128).max_prompt_length == 64
    assert config(max_length=128, lmbda=1.0).max_prompt_length == 512
    assert config(max_length=128, max_prompt_length=100).max_prompt_length == 100


def test_max_tokens_becomes_steps():
    sizes = dict(max_length=512, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    assert config(max_tokens=80_000_000, **sizes).max_steps == 9766, "80 M / (512 x 16) is 9765.6"
    assert config(max_tokens=512 * 16 * 3, **sizes).max_steps == 3
    assert config(max_tokens=512 * 16 * 3, max_steps=3, **sizes).max_steps == 3, "as recipe.yaml of a run has them"
    with pytest.raises(ValueError, match="max_steps 2 and max_tokens 100, which means 1 steps of 16 x 512 tokens"):
        config(max_tokens=100, max_steps=2, **sizes)
    for options in (dict(packing=False), dict(lmbda=0.5), dict(text_prompt_length=4)):
        with pytest.raises(
            ValueError, match="max_tokens 100 counts sequences of max_length tokens, and only plain text"
        ):
            config(max_tokens=100, **sizes, **options)


def test_every_field_has_help():
    from dataclasses import fields

    for field in fields(SEKDConfig):
        assert field.metadata.get("help") or field.name.startswith("_"), field.name


def test_no_field_looks_like_the_token_of_an_account():
    """transformers hides the values of fields that end so, and recipe.yaml leaves them out."""
    assert not [name for name in SEKDConfig.__annotations__ if name.endswith("_token")]
