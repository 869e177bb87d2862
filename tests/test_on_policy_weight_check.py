"""An engine that samples from other weights than the student's is refused, now and at later syncs."""

import importlib.util

import pytest
import torch
from helpers import EOS, make_model, make_trainer, make_vllm_model
from rollout_helpers import Counting, make_run
from serving import Served, SmallServer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from rollouts import RolloutConfigError
from sekd.on_policy.weight_check import CHECK_EVERY, MAX_DIFFERENCE

SERVED = dict(lmbda=1.0, rollout_engine="vllm_server", max_prompt_length=16, max_steps=4, learning_rate=3e-3)


@pytest.fixture
def train(tmp_path, tokenizer, pairs):
    """A function that trains with a server, which may ignore weight syncs."""
    servers = []

    def train(model=None, takes_weights=True, before=lambda path, body: None, student=None, **options):
        servers.append(SmallServer(Served(model or make_model("untied"), takes_weights), before))
        settings = SERVED | dict(rollout_server_urls=[servers[-1].url]) | options
        trainer = make_trainer(tmp_path, tokenizer, pairs, student, **settings)
        try:
            trainer.train()
        finally:
            trainer.close()
        return [log for log in trainer.state.log_history if "loss" in log]

    yield train
    for server in servers:
        server.shutdown()


def test_a_server_that_takes_every_sync_passes_and_the_log_says_what_was_checked(train):
    logs = train()
    assert [log["weight_checks"] for log in logs] == [1] * 4
    assert all(0 <= log["weight_difference"] < 1e-5 for log in logs)


def test_a_server_that_ignores_every_sync_is_refused(train):
    """Before the first step it has the student's very weights."""
    message = r"rollout server http.* computes other probabilities .* after weight sync [234] .* it still has those of"
    with pytest.raises(RolloutConfigError, match=message):
        train(takes_weights=False)


def test_a_server_that_ignores_syncs_is_noticed_while_weights_change_slowly(train):
    """Long before the difference is that of another model."""
    with pytest.raises(RolloutConfigError, match=r"differ by 0.0[3-9]\d* on average\), so it still has"):
        train(takes_weights=False, learning_rate=2e-4, max_steps=30)


def test_weights_that_do_not_change_are_no_fault(train):
    assert len(train(takes_weights=False, learning_rate=0.0)) == 4


def test_a_server_with_another_model_is_refused(train):
    with pytest.raises(RolloutConfigError, match=r"after weight sync 1 .* it samples from another model: it serves"):
        train(make_model("untied", 5), takes_weights=False)


def make_loud(seed=0):
    """A student with logits so large that bf16 changes its log-probabilities by more than 0.1 nats."""
    model = make_model("untied", seed)
    with torch.no_grad():
        model.lm_head.weight *= 100
    return model


def test_what_the_student_rounds_is_allowed(train):
    """The server computes in float32."""
    logs = train(make_loud(), student=make_loud(), bf16=True, learning_rate=1e-5)
    assert max(log["weight_difference"] for log in logs) > MAX_DIFFERENCE
    with pytest.raises(RolloutConfigError, match=r"after weight sync 1 .* it samples from another model: it serves"):
        train(make_loud(5), student=make_loud(), takes_weights=False, bf16=True)


def test_a_server_that_does_not_answer_a_check_is_asked_again_in_the_round(train):
    """A check is no round: what a round survives must not end the run."""
    broken = []

    def before(path, body):
        if "prompt_logprobs" in body and len(broken) < 2:
            broken.append(path)
            raise ConnectionError

    logs = train(before=before)
    assert [log.get("weight_checks") for log in logs] == [None, None, 1, 1]


def test_now_and_then(tmp_path, tokenizer, pairs):
    """Each of the first syncs, later every tenth; a new engine is checked from the start."""

    class Asked(Counting):
        asked = 0

        def logprobs(self, token_ids):
            self.asked += 1
            return super().logprobs(token_ids)

    engine = Asked()
    trainer = make_run(tmp_path, tokenizer, pairs, engine, max_steps=2 * CHECK_EVERY + 1)
    trainer.train()
    assert engine.asked == CHECK_EVERY + 2
    trainer.close()
    assert trainer.schedule.weight_check.syncs == 0


def test_an_engine_that_samples_from_the_student_itself_is_not_asked(tmp_path, tokenizer, pairs):
    trainer = make_trainer(tmp_path, tokenizer, pairs, lmbda=1.0)
    trainer.train()
    assert not any("weight_checks" in log for log in trainer.state.log_history)


def make_moe(seed=0):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=64, num_experts=4, num_experts_per_tok=2)
    sizes |= dict(eos_token_id=EOS, pad_token_id=122, bos_token_id=None, norm_topk_prob=True)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.slow
@pytest.mark.xdist_group("vLLM in process")
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU vLLM may reload experts as they are")
def test_vllm_in_process_with_other_experts_than_the_students_is_refused(tmp_path, tokenizer, pairs):
    """On a CPU, vLLM's reload_weights leaves other experts than it was given, without an error."""
    options = SERVED | dict(rollout_engine="vllm", vllm_enforce_eager=True)
    trainer = make_trainer(tmp_path, tokenizer, pairs, make_moe(), make_vllm_model(1), **options)
    with pytest.raises(RolloutConfigError, match=r"vLLM in this process computes .*use rollout_engine: hf") as caught:
        trainer.train()
    assert "server" not in str(caught.value)
