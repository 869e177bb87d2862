"""Both backends compute what the model's own logits say."""

import json
import os

import pytest
import torch
from evaluation_helpers import save_adapter, save_model
from helpers import EOS, make_model, make_tokenizer, make_vllm_model
from lm_eval.api.instance import Instance
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sekd.eval.backends import (
    BACKENDS,
    BackendOptions,
    choose_backend,
    close_lm,
    count_longest,
    is_out_of_memory,
    load_lm,
    load_model_tokenizer,
    read_context_length,
    shrink_batches,
)
from sekd.eval.records import EvaluationRefused

PAIRS = [("w1 w2 w3", " w4 w5"), ("w9", " w7"), ("w1 w2 w3", " w6"), ("w11 w12 w13 w14 w15", " w16 w17 w18")]
FLOAT32 = BackendOptions(dtype="float32", context=64)


def ask(kind, *arguments):
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def sum_logps(model, pairs):
    """The log-likelihoods of continuations and whether each is the greedy one, by the model's dense logits."""
    tokenizer, answers = make_tokenizer(), []
    for context, continuation in pairs:
        ids, length = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        rows = [(logps[t - 1, ids[t]].item(), logps[t - 1].argmax().item() == ids[t]) for t in range(length, len(ids))]
        answers.append((sum(value for value, _ in rows), all(hit for _, hit in rows)))
    return answers


def continue_greedily(model, text, count):
    tokenizer = make_tokenizer()
    ids = tokenizer(text)["input_ids"]
    new = []
    while len(new) < count:
        with torch.no_grad():
            best = model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax().item()
        if best == EOS:
            break
        new.append(best)
    return tokenizer.decode(new)


def check_lm(lm, model, tolerance):
    """Compare likelihoods and greedy outputs with the model."""
    answers = lm.loglikelihood(ask("loglikelihood", *PAIRS), disable_tqdm=True)
    for (value, greedy), (expected, expected_greedy) in zip(answers, sum_logps(model, PAIRS), strict=True):
        assert value == pytest.approx(expected, abs=tolerance)
        assert greedy == expected_greedy
    prompts = [context for context, _ in PAIRS[:2]]
    how = {"until": ["zzz"], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}
    outputs = lm.generate_until(ask("generate_until", *((p, how) for p in prompts)), disable_tqdm=True)
    assert [o.split() for o in outputs] == [continue_greedily(model, p, 6).split() for p in prompts]


@pytest.fixture
def adapter(tmp_path):
    """An adapter's folder, and the model that it makes. The tokenizer has fewer tokens than the model has classes."""
    base = save_model(tmp_path / "base")
    folder = save_adapter(tmp_path / "adapter", base, make_model("untied"))
    return folder, PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


def test_hf_gives_the_models_own_likelihoods_and_greedy_outputs(tmp_path):
    folder = save_model(tmp_path)
    check_lm(load_lm(folder, "hf", FLOAT32), make_model("untied"), 1e-4)


def test_hf_applies_an_adapter_over_all_classes(adapter):
    folder, model = adapter
    assert len(make_tokenizer()) < model.config.vocab_size
    lm = load_lm(folder, "hf", FLOAT32)
    check_lm(lm, model, 1e-4)
    base = AutoModelForCausalLM.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    assert sum_logps(base, PAIRS)[0][0] != pytest.approx(sum_logps(model, PAIRS)[0][0], abs=1e-3)


def test_the_models_own_generation_settings_do_not_change_outputs(tmp_path):
    folder = save_model(tmp_path)
    path = tmp_path / "generation_config.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps(own | {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1}))
    check_lm(load_lm(folder, "hf", FLOAT32), make_model("untied"), 1e-4)


def test_likelihoods_are_not_rounded_to_half_precision(tmp_path):
    folder = save_model(tmp_path)
    lm = load_lm(folder, "hf", BackendOptions(dtype="bfloat16"))
    assert lm.model.dtype == torch.bfloat16
    values = [value for value, _ in lm.loglikelihood(ask("loglikelihood", *PAIRS), disable_tqdm=True)]
    assert any(value != torch.tensor(value).bfloat16().item() for value in values)


@pytest.mark.slow
def test_vllm_agrees_with_the_model(tmp_path):
    folder = save_model(tmp_path, kind="vllm")
    lm = load_lm(folder, "vllm", FLOAT32)
    try:
        assert lm.max_length == 64, "not the model's 32,768"
        assert lm.takes_seed
        check_lm(lm, make_vllm_model(), 1e-3)
    finally:
        close_lm(lm, "vllm")


@pytest.mark.slow
def test_vllm_applies_an_adapter_and_repeats_samples_of_a_seed(tmp_path):
    base = save_model(tmp_path / "base", kind="vllm")
    folder = save_adapter(tmp_path / "adapter", base, make_vllm_model(), r=3)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    lm = load_lm(folder, "vllm", BackendOptions(dtype="float32", context=64, samples=True))
    try:
        check_lm(lm, model, 1e-3)
        how = {"until": ["zzz"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "top_k": 0}
        asked = ask("generate_until", *(("w1 w2", how | {"seed": seed}) for seed in (1, 2, 1)))
        first, second, again = lm.generate_until(asked, disable_tqdm=True)
        assert first == again
        assert first != second
    finally:
        close_lm(lm, "vllm")


def test_the_first_backend_that_is_installed_is_the_default(monkeypatch):
    assert choose_backend() == "vllm"
    monkeypatch.setattr("sekd.eval.backends.find_spec", lambda name: None if name == "vllm" else object())
    assert choose_backend() == "hf"


def test_the_context_is_that_of_the_longest_prompt_with_its_output(tmp_path):
    tokenizer = make_tokenizer()
    assert count_longest(["w1 w2", "w1 w2 w3 w4", "w1"], 5, tokenizer) == 9
    assert count_longest(["w1 w2"], 0, tokenizer) == 3, "vLLM generates one token"
    folder = save_model(tmp_path)
    assert read_context_length(folder, tokenizer) == make_model("untied").config.max_position_embeddings


def test_an_adapter_has_the_tokenizer_of_its_base_unless_it_has_its_own(adapter):
    folder, _ = adapter
    assert "<bye>" not in load_model_tokenizer(folder).get_vocab()
    own = make_tokenizer()
    own.add_tokens(["<bye>"])
    own.save_pretrained(folder)
    assert "<bye>" in load_model_tokenizer(folder).get_vocab()


def break_lack(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_an_adapter_that_lacks_weights_is_refused(adapter):
    folder, _ = adapter
    path = os.path.join(folder, "adapter_model.safetensors")
    weights = load_file(path)
    weights.pop(next(iter(weights)))
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(EvaluationRefused, match="its files lack weights of the adapter: Found missing adapter keys"):
        load_lm(folder, "hf", FLOAT32)


def break_cut(folder):
    os.truncate(folder / "model.safetensors", 1000)


def break_none(folder):
    (folder / "model.safetensors").unlink()


def break_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (break_lack, "its files lack 1 weights, such as model.layers.1.mlp.up_proj.weight"),
        (break_cut, "Error while deserializing header"),
        (break_none, "no file named"),
        (break_shape, "mismatch"),
    ],
)
def test_damaged_weights_are_named(tmp_path, damage, reason):
    folder = save_model(tmp_path)
    damage(tmp_path)
    with pytest.raises(EvaluationRefused, match="cannot be loaded with hf") as error:
        load_lm(folder, "hf", FLOAT32)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_batches_shrink_until_they_fit_or_the_model_is_refused(tmp_path):
    lm = load_lm(save_model(tmp_path), "hf", BackendOptions(dtype="float32", batch_size=3))
    shrink_batches(lm, "hf", "m", False, MemoryError())
    assert lm.batch_size == 1
    with pytest.raises(
        EvaluationRefused, match=r"MODEL 'm' does not fit into memory: lower --batch-size, .* batches of"
    ):
        shrink_batches(lm, "hf", "m", False, MemoryError())
    lm.batch_size_per_gpu = 8
    with pytest.raises(EvaluationRefused, match="in batches of 8"):
        shrink_batches(lm, "hf", "m", True, MemoryError())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (ValueError("To serve at least one request, 9 GiB KV cache is needed, which is larger than"), True),
        (ValueError("Free memory on device (1/80 GiB) on startup is less than desired"), True),
        (ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"), True),
        (
            ValueError("Available memory on node 0 (1/80 GiB) on kv cache allocation is less than requested memory"),
            True,
        ),
        (ValueError("FP8 KV cache is not yet supported on CPU"), False),
        (RuntimeError("size mismatch"), False),
        (OSError(2, "No such file"), False),
    ],
)
def test_which_errors_mean_that_a_model_does_not_fit(error, expected):
    assert is_out_of_memory(error) == expected


def test_closing_frees_the_weights(tmp_path):
    import weakref

    lm = load_lm(save_model(tmp_path), "hf", FLOAT32)
    weight = weakref.ref(next(lm.model.parameters()))
    close_lm(lm, "hf")
    assert weight() is None
    assert {backend.package for backend in BACKENDS.values()} == {"vllm", "transformers"}
