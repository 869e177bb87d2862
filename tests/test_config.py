"""Every value that cannot work is refused, with the field, the value and the remedy."""

import importlib.util

import pytest
import torch

from sekd import SEKDConfig


def config(**kwargs):
    return SEKDConfig(output_dir="unused", **{"rollout_engine": "hf", **kwargs})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(position_fraction=0.0), r"position_fraction 0.0 is outside \(0, 1\]; write 0.2 for 20 %"),
        (dict(position_fraction=20), r"position_fraction 20 is outside"),
        (dict(lmbda=1.5), r"lmbda 1.5 is outside \[0, 1\]; 0 is off-policy, 1 on-policy"),
        (dict(lmbda=-0.1), r"lmbda -0.1 is outside"),
        (dict(kd_weight=2.0), r"kd_weight 2.0 is outside \[0, 1\]; 1 is the divergence alone"),
        (dict(kd_temperature=0.0), r"kd_temperature 0.0 must be above 0"),
        (
            dict(jsd_beta=1.0),
            r"jsd_beta 1.0 is outside \(0, 1\]?\)?; its limits are divergence: forward_kl and reverse_kl",
        ),
        (dict(divergence="kl"), r"divergence 'kl' is unknown; choose one of forward_kl, reverse_kl, jsd"),
        (dict(position_score="entropy"), r"position_score 'entropy' is unknown; choose one of student_entropy"),
        (dict(position_policy="top"), r"position_policy 'top' is unknown; choose one of all, top_k, random"),
        (dict(rollout_engine="tgi"), r"rollout_engine 'tgi' is unknown; choose one of vllm, hf"),
        (dict(overlong_prompts="cut"), r"overlong_prompts 'cut' is unknown; choose one of error, drop"),
        (dict(teacher_dtype="int8"), r"teacher_dtype 'int8' is unknown; choose one of auto, bfloat16"),
        (dict(temperature=-1.0), r"temperature -1.0 must not be negative; 0 is greedy"),
        (dict(top_p=0.0), r"top_p 0.0 is outside \(0, 1\]"),
        (dict(top_k=-1), r"top_k -1 must not be negative"),
        (dict(min_p=1.1), r"min_p 1.1 is outside \[0, 1\]"),
        (dict(max_length=0), r"max_length 0 must be at least 1"),
        (dict(max_completion_length=0), r"max_completion_length 0 must be at least 1"),
        (dict(head_chunk_rows=0), r"head_chunk_rows 0 must be at least 1"),
        (dict(torch_compile=True), r"torch_compile: true is not supported"),
        (dict(prompt_template="Q:"), r"prompt_template 'Q:' lacks \{prompt\}"),
    ],
)
def test_values_that_cannot_work(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_vllm_asked_for_but_not_installed_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else found(name, *a))
    with pytest.raises(ValueError, match=r"needs vLLM, which is not installed: run `bash scripts/setup.sh`"):
        config(lmbda=1.0, rollout_engine="vllm")
    config(lmbda=0.0, rollout_engine="vllm")  # nobody generates


def test_the_divergence_follows_the_mode():
    assert config(lmbda=0.0).divergence == "forward_kl"
    assert config(lmbda=0.5).divergence == "reverse_kl"
    assert config(lmbda=1.0, divergence="jsd").divergence == "jsd"


def test_bf16_where_the_hardware_has_it():
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not torch.accelerator.is_available():
        assert config().bf16 == native
    assert config(bf16=False).bf16 is False


def test_every_field_has_help():
    from dataclasses import fields

    for field in fields(SEKDConfig):
        assert field.metadata.get("help") or field.name.startswith("_"), field.name
