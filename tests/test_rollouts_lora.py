"""LoRA students: the adapter alone reaches vLLM, in this process and over HTTP, and equals a merged copy."""

import importlib.util

import pytest
import torch
from helpers import EOS, keep_engine, make_tokenizer, make_trainer, make_vllm_model
from peft import LoraConfig
from rollout_helpers import PROMPTS, check_parity, check_syncs, make_lora, model_logps, vllm_logps
from serving import Server

from rollouts import VLLMEngine, VLLMServerEngine
from sekd.on_policy.engines import send_weights
from sekd.on_policy.weights import extract_adapter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("a server for adapters"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "base"
    make_vllm_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(folder):
    server = Server(folder, "--enable-lora", "--max-lora-rank", "8", eager=False)
    yield server
    server.kill()


OPTIONS = dict(max_completion_length=16, max_prompt_length=32, stop_token_ids=[EOS])


@pytest.fixture(scope="module")
def in_process(folder):
    engine = VLLMEngine(str(folder), dtype="bfloat16", lora_rank=4, **OPTIONS)
    yield engine
    engine.close()


@pytest.fixture(params=["in process", "server"])
def engine(request, tmp_path):
    """Each engine, with the base weights."""
    if request.param == "in process":
        yield request.getfixturevalue("in_process")
        return
    url = request.getfixturevalue("server").url
    engine = VLLMServerEngine(url, weights_folder=str(tmp_path), timeout=240, **OPTIONS)
    yield engine
    engine.close()


def test_log_probabilities_agree_after_an_adapter_and_not_without_the_next(engine):
    check_parity(engine, make_lora())


def test_merged_copies_in_process(folder):
    """vLLM does not apply DoRA."""
    model = make_lora(use_dora=True)
    assert extract_adapter(model) is None
    engine = VLLMEngine(str(folder), dtype="bfloat16", enforce_eager=True, **OPTIONS)
    check_parity(engine, model)
    check_syncs(engine, model)
    engine.close()


def test_100_syncs_leave_the_student_as_it_is(engine):
    check_syncs(engine, make_lora())
    if isinstance(engine, VLLMServerEngine):
        loaded = [m["id"] for m in engine.http.call(engine.urls[0], "/v1/models")["data"]]
        assert len(loaded) == 2, "the base and one adapter; old ones are dropped"


def test_whole_weights_are_refused_by_an_engine_for_adapters(engine):
    with pytest.raises(ValueError, match="adapters only"):
        send_weights(engine, make_lora(), 0, 0)
    with pytest.raises(ValueError, match="adapters only"):
        send_weights(engine, make_lora(r=16), 0, engine.lora_rank)


def test_a_server_that_lost_the_adapter_gets_it_again(server, tmp_path):
    """A restarted server has lost it, too."""
    engine, model = VLLMServerEngine(server.url, weights_folder=str(tmp_path), timeout=240, **OPTIONS), make_lora()
    send_weights(engine, model, 3, engine.lora_rank)
    expected = engine.generate(PROMPTS)
    send_weights(engine, model, 3, engine.lora_rank)
    engine._unload_adapter(server.url, engine.version)
    assert engine.generate(PROMPTS) == expected
    engine.close()


ONE_STEP = dict(
    vllm_enforce_eager=True, lmbda=1.0, max_steps=2, max_completion_length=12, max_prompt_length=16, temperature=1.0
)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_lora_run_in_process(tmp_path, tokenizer, pairs, kind):
    """vLLM does not apply DoRA, so merged copies are sent."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", use_dora=kind == "merged")
    models, trained = (make_vllm_model(), make_vllm_model(1)), dict(peft_config=lora)
    trainer = make_trainer(tmp_path, tokenizer, pairs, *models, trained, rollout_engine="vllm", **ONE_STEP)
    keep_engine(trainer).train()
    assert (extract_adapter(trainer.model) is not None) == (kind == "adapter")
    engine = trainer.engine
    assert (engine.lora is not None) == (kind == "adapter")
    send_weights(engine, trainer.model, 2, engine.lora_rank)
    ids = [1, 2, 3, *engine.generate([[1, 2, 3]])[0].completion_ids]
    assert (vllm_logps(engine, ids) - model_logps(trainer.model, ids)).abs().max() < 1e-3
    assert not list((tmp_path / "rollout_config").glob("*.safetensors")), "weights are removed after vLLM has read them"
    trainer.close()


def test_a_resumed_run_in_process_is_the_undisturbed_run(tmp_path, tokenizer, pairs):
    """vLLM seeds the generators of the process when it starts, and draws from them in every round."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.3)
    options = ONE_STEP | dict(rollout_engine="vllm", max_steps=4, save_strategy="steps", save_steps=2)

    def run(checkpoint=None):
        models = make_vllm_model(), make_vllm_model(1)
        trainer = make_trainer(tmp_path, tokenizer, pairs, *models, dict(peft_config=lora), **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.close()
        return {n: p.detach() for n, p in trainer.model.named_parameters()}, torch.get_rng_state()

    whole, state = run()
    resumed, resumed_state = run(str(tmp_path / "checkpoint-2"))
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name
    assert torch.equal(resumed_state, state)


def test_a_lora_run_over_http(tmp_path, tokenizer, pairs, server):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    options = ONE_STEP | dict(rollout_engine="vllm_server", rollout_server_urls=[server.url], rollout_timeout=240.0)
    models = make_vllm_model(), make_vllm_model(1)
    trainer = make_trainer(tmp_path, tokenizer, pairs, *models, dict(peft_config=lora), **options)
    keep_engine(trainer).train()
    assert trainer.engine.is_adapter
    trainer.close()
