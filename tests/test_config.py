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
        (dict(position_score="entropy"), r"position_score 'entropy' is unknown; choose from student_entropy"),
        (dict(position_score='{"kl": '), r"position_score '\{\"kl\": ' is no mapping"),
        (dict(position_score={"kl": 1.0, "hk": 1.0}), r"position_score 'hk' is unknown; choose from student_entropy"),
        (dict(position_score=3), "position_score 3 is neither a name nor weights; write kl, or"),
        (dict(position_score=["kl"]), r"position_score \['kl'\] is neither a name nor weights"),
        (dict(position_score={}), "has no weight other than 0"),
        (dict(position_score={"kl": "much"}), "the weight of kl is 'much'; write a number such as 0.5"),
        (
            dict(position_score="kl", position_policy="tip"),
            "position_score 'kl' has no effect: position_policy 'tip' reads student_entropy and reverse_kl; leave",
        ),
        (
            dict(score_normalization="zscore", position_policy="random"),
            "score_normalization 'zscore' has no effect: position_policy 'random' reads no score",
        ),
        (
            dict(divergence="at_kd", position_policy="pos_rs"),
            "'at_kd' weighs positions itself",
        ),
        (dict(decoupled_alpha=0.0, decoupled_beta=0.0), "decoupled_alpha and decoupled_beta are both 0"),
        (dict(kd_temperature=float("nan")), "kd_temperature nan is no number that can be used; write a finite one"),
        (dict(bandit_alpha=float("inf")), "bandit_alpha inf is no number that can be used"),
        (dict(position_fraction=True), "position_fraction True is no number"),
        (dict(position_skip=1.5), "position_skip 1.5 must be a whole number"),
        (dict(gls_queue_size=10**9), "gls_queue_size 1000000000 must be from 1 to 10,000,000"),
        (dict(samples_file=""), "samples_file is empty; name a path, or leave it out"),
        (dict(text_prompt_length=0), "text_prompt_length 0 must be a whole number from 1 to max_prompt_length 512"),
        (dict(text_prompt_length=9, max_prompt_length=8), "text_prompt_length 9 must be .* to max_prompt_length 8"),
        (dict(text_prompt_length=1.5), "text_prompt_length 1.5 must be a whole number"),
        (dict(teacher_cache="c", lmbda=0.5), "lmbda 0.5 with teacher_cache: a cache knows the data's rows"),
        (dict(teacher_cache="c", class_selection="top_k_classes"), "teacher_cache holds rs_kd targets"),
        (dict(teacher_cache="c", class_samples=65), "class_samples 65 with teacher_cache: counts have 6 bits"),
        (dict(teacher_cache="c", position_score="kl"), "teacher_cache lacks what kl of position_policy 'top_k' needs"),
        (
            dict(teacher_cache="c", position_policy="tip"),
            "teacher_cache lacks what reverse_kl of",
        ),
        (
            dict(teacher_cache="c", sample_fraction=0.5, sample_score="kl"),
            "sample_score 'kl' needs a teacher, and teacher_cache stands in for it",
        ),
        (dict(score_normalization="log"), r"score_normalization 'log' is unknown; choose one of none, zscore, minmax"),
        (
            dict(position_policy="pos_rs", score_normalization="zscore"),
            "makes negative scores, which position_policy 'pos_rs' cannot take for proportions; use minmax or none",
        ),
        (
            dict(position_policy="weighted", position_score={"kl": 1.0, "student_ce": -1.0}),
            "position_score has a negative weight, and position_policy 'weighted' takes scores for proportions",
        ),
        (dict(position_skip=-1), "position_skip -1 must not be negative; 0 skips no position"),
        (dict(curriculum_steps=0), "curriculum_steps 0 must be at least 1"),
        (dict(gls_queue_size=0), "gls_queue_size 0 must be from 1 to"),
        (dict(pos_rs_exponent=-0.5), "pos_rs_exponent -0.5 must not be negative"),
        (dict(pos_rs_coverage=1.0), r"pos_rs_coverage 1.0 is outside \[0, 1\); at 1 choose position_policy: top_k"),
        (dict(bandit_alpha=-1.0), "bandit_alpha -1.0 must not be negative; 0 never explores"),
        (dict(bandit_ridge=0.0), "bandit_ridge 0.0 must be above 0"),
        (dict(skew_alpha=0.0), r"skew_alpha 0.0 is outside \(0, 1\)"),
        (dict(decoupled_beta=-8.0), "decoupled_beta -8.0 must not be negative; 0 leaves that part out"),
        (dict(class_selection="rskd"), "class_selection 'rskd' is unknown; choose one of full, rs_kd, top_k_classes"),
        (dict(class_samples=0), "class_samples 0 must be at least 1"),
        (dict(sampled_softmax=-1), "sampled_softmax -1 must not be negative; 0 uses all classes"),
        (dict(sampled_softmax=4096), "compares the student on kept classes only; set class_selection: rs_kd"),
        (
            dict(class_selection="rs_kd", divergence="reverse_kl"),
            "class_selection 'rs_kd' estimates forward KL only; set divergence: forward_kl",
        ),
        (
            dict(class_selection="rs_kd", sampled_softmax=4096, kd_weight=0.5),
            "kd_weight 0.5 mixes in a cross-entropy, which needs the student's whole softmax",
        ),
        (dict(class_selection="rs_kd", sampled_softmax=64), "sampled_softmax 64 must be above class_samples 64"),
        (dict(sample_fraction=0.0), r"sample_fraction 0.0 is outside \(0, 1\]; 0.2 keeps 20 %"),
        (dict(sample_score="loss"), "sample_score 'loss' is unknown; choose one of student_entropy"),
        (dict(sample_pool=0), "sample_pool 0 must be at least 1"),
        (dict(position_policy="top"), r"position_policy 'top' is unknown; choose one of all, top_k, random"),
        (dict(rollout_engine="tgi"), r"rollout_engine 'tgi' is unknown; choose one of vllm, vllm_server, hf"),
        (dict(rollout_timeout=0), "rollout_timeout 0.* must be above 0 seconds"),
        (
            dict(rollout_server_urls=["localhost:8000"]),
            "'localhost:8000' is no address of a server; write http://127.0.0.1:8000",
        ),
        (dict(rollout_server_urls=[], rollout_engine="vllm_server"), "rollout_server_urls is empty: name the servers"),
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


def test_options_that_nothing_reads_are_named(caplog, monkeypatch):
    warnings = []
    monkeypatch.setattr("sekd.validation.logger.warning", warnings.append)
    config(pos_rs_exponent=0.5, jsd_beta=0.3, class_samples=12)
    assert warnings == [
        f"{name} has no effect on what was chosen"
        for name in ("class_samples 12", "jsd_beta 0.3", "pos_rs_exponent 0.5")
    ]
    warnings.clear()
    config(position_policy="pos_rs", pos_rs_exponent=0.5, divergence="jsd", jsd_beta=0.3)
    assert not warnings


def test_options_reach_their_policy_and_divergence():
    assert config(position_policy="pos_rs", pos_rs_exponent=0.5).policy_options == {"exponent": 0.5, "coverage": 0.0}
    assert config(position_policy="bandit").policy_options == {"alpha": 1.0, "ridge": 1.0}
    assert config(position_policy="top_k").policy_options == {}
    assert config(divergence="decoupled_kl").divergence_options == {"alpha": 1.0, "beta": 8.0}


def test_bf16_where_the_hardware_has_it():
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not torch.accelerator.is_available():
        assert config().bf16 == native
    assert config(bf16=False).bf16 is False


def test_every_field_has_help():
    from dataclasses import fields

    for field in fields(SEKDConfig):
        assert field.metadata.get("help") or field.name.startswith("_"), field.name
