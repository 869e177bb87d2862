"""Engines, with real models and a real vLLM."""

import copy
import importlib.util
import math
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import EOS, keep_engine, make_tokenizer, make_trainer, make_vllm_model
from rollout_helpers import PROMPTS, SAID, model_logps, say, vllm_logps
from transformers import AutoModelForCausalLM, TrainerCallback

from rollouts import BaseEngine, HFEngine, RolloutConfigError, RolloutEngine, Sampling, VLLMEngine, get_trait
from rollouts.base import named_weights, request_seeds

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")


pytestmark = pytest.mark.xdist_group("vLLM in process")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_vllm_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def vllm(folder):
    options = dict(dtype="bfloat16", stop=["in no token"], top_logprobs=1)  # tests may change them
    engine = VLLMEngine(folder, max_completion_length=16, max_prompt_length=32, **options)
    yield engine
    engine.close()


@pytest.fixture(params=["hf", pytest.param("vllm", marks=[needs_vllm, pytest.mark.slow])])
def engine(request, folder):
    """Each engine with the model of ``folder``."""
    if request.param == "vllm":
        shared = request.getfixturevalue("vllm")
        shared.sync_weights(make_vllm_model(), 0)
        return shared
    return HFEngine(folder, max_completion_length=16)


@contextmanager
def sampling(engine, **options):
    """Sample with other options in the block."""
    before = engine.sampling
    engine.sampling = replace(before, **options)
    try:
        yield
    finally:
        engine.sampling = before


def sampled(kind, request, folder, **options):
    """Greedy rollouts of the prompts, by one kind of engine."""
    options = dict(temperature=0.0) | options
    if kind == "hf":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        engine = HFEngine(model, tokenizer=make_tokenizer(), **{"max_completion_length": 16} | options)
        return engine.generate(PROMPTS)
    vllm = request.getfixturevalue("vllm")
    vllm.sync_weights(make_vllm_model(), 0)
    with sampling(vllm, **options):
        return vllm.generate(PROMPTS)


KINDS = pytest.mark.parametrize("kind", ["hf", pytest.param("vllm", marks=[needs_vllm, pytest.mark.slow])])


@KINDS
def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(kind, request, folder):
    plain = sampled(kind, request, folder)
    tokens = [t for r in plain for t in r.completion_ids[2:-1] if 20 <= t < 100]  # two digits: in no other word
    rollouts = sampled(kind, request, folder, stop=[f"w{tokens[0]}", f"w{tokens[-1]}"])
    stopped = 0
    for before, now in zip(plain, rollouts, strict=True):
        ends = [i for i, t in enumerate(before.completion_ids) if t in (tokens[0], tokens[-1])]
        assert now.completion_ids == before.completion_ids[: ends[0] + 1 if ends else None]
        assert now.finish_reason == ("stop" if ends else before.finish_reason)
        stopped += bool(ends)
    assert stopped


@KINDS
def test_a_stop_string_that_begins_in_the_prompt_ends_nothing(kind, request, folder):
    plain, tested = sampled(kind, request, folder), 0
    for i, rollout in enumerate(plain):
        ids = rollout.completion_ids
        pair = rollout.prompt_ids[-1], ids[0]
        if pair not in pairwise(ids):
            assert sampled(kind, request, folder, stop=["w{} w{}".format(*pair)])[i] == rollout
            tested += 1
    assert tested


@KINDS
def test_a_round_with_other_options_is_that_of_an_engine_with_these_options(kind, request, folder):
    """Greedy, longer and with stop strings."""
    plain = sampled(kind, request, folder)
    stops = [f"w{token}" for rollout in plain for token in rollout.completion_ids[2:-1] if 20 <= token < 100][:1]
    expected = sampled(kind, request, folder, stop=stops, max_completion_length=12)
    assert expected != plain
    if kind == "hf":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        engine = HFEngine(model, max_completion_length=4, tokenizer=make_tokenizer())
    else:
        engine = request.getfixturevalue("vllm")
    options = replace(engine.sampling, temperature=0.0, stop=stops, max_completion_length=12, top_logprobs=0)
    assert engine.generate_with(PROMPTS, options) == expected


def test_sampling_knows_whether_it_changes_the_distribution():
    assert Sampling(max_completion_length=3, stop=["x"], seed=4).is_unchanged
    changes = dict(temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2)
    assert not any(Sampling(**{name: value}).is_unchanged for name, value in changes.items())


def test_a_round_with_other_options_changes_no_later_round(engine):
    options = Sampling(temperature=0.7, max_completion_length=5, seed=3)
    torch.manual_seed(0)
    before = [engine.generate(PROMPTS), engine.generate(PROMPTS)]
    engine.sync_weights(engine.model if engine.model is not None else make_vllm_model(), 0)
    own = engine.sampling
    after = [engine.generate(PROMPTS)]
    extra = engine.generate_with(PROMPTS, options)
    assert engine.generate_with(PROMPTS, options) == extra, "the same at every call"
    after.append(engine.generate(PROMPTS))
    assert after == before
    assert before[0] != before[1]
    assert engine.sampling is own
    assert {len(rollout.completion_ids) for rollout in extra} == {5}
    assert engine.generate_with(PROMPTS, replace(options, seed=4)) != extra


@KINDS
def test_a_repetition_penalty_is_on_the_tokens_of_the_sequence_alone(kind, request, folder):
    """Greedy decoding by hand, without padding; padding is not penalised."""
    model, penalty = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), 1.5
    rollouts = sampled(kind, request, folder, repetition_penalty=penalty)
    assert rollouts != sampled(kind, request, folder)
    for rollout in rollouts:
        ids = list(rollout.prompt_ids)
        for token in rollout.completion_ids:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            seen = sorted({*ids})
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            assert logits[token] >= logits.max() - 0.02, "up to bf16's ties"
            ids.append(token)


@KINDS
def test_top_log_probabilities_are_those_before_temperature_and_penalty(kind, request, folder):
    options = dict(temperature=0.5, top_p=0.9, repetition_penalty=1.2, top_logprobs=5)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for rollout in sampled(kind, request, folder, **options):
        ids, length = rollout.prompt_ids + rollout.completion_ids, len(rollout.prompt_ids)
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        assert rollout.top_logprobs.shape == (len(rollout.completion_ids), 5)
        top = torch.from_numpy(rollout.top_logprobs)
        torch.testing.assert_close(top, logp[length - 1 : -1].topk(5).values, atol=0.03, rtol=0)


def first_tokens(kind, request, folder, model, **options):
    """The tokens that an engine draws after ``SAID``."""
    options = dict(temperature=1.0, seed=0, max_completion_length=1) | options
    if kind == "hf":
        rollouts = HFEngine(model, batch_size=400, **options).generate([SAID] * 400)
    else:
        vllm = request.getfixturevalue("vllm")
        vllm.sync_weights(model, 0)
        with sampling(vllm, **options):
            rollouts = vllm.generate([SAID] * 400)
    return {r.completion_ids[0] for r in rollouts}


@KINDS
@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        (dict(min_p=0.35), {10, 20}),
        (dict(min_p=0.35, top_p=0.65), {10}),  # top_p first would leave both
        (dict(top_k=3, top_p=0.75), {10, 20}),  # top_p first would leave three
        (dict(min_p=0.2, top_k=3, top_p=0.99), {10, 20, 30}),
        (dict(min_p=0.35, temperature=2.0), {10, 20, 30, 40}),  # temperature comes before all
    ],
)
def test_truncations_leave_the_same_tokens_in_every_engine(kind, request, folder, options, tokens):
    probs = {10: 0.5, 20: 0.22, 30: 0.16, 40: 0.12}
    model = say(make_vllm_model(), {token: 12 + math.log(p) for token, p in probs.items()})
    assert first_tokens(kind, request, folder, model, **options) == tokens


@KINDS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_class_that_the_teacher_lacks_is_drawn(kind, request, folder, temperature):
    """The student nearly always says 110; the likeliest of the first 100 tokens takes its place."""
    model = say(make_vllm_model(), {110: 30.0, 40: 15.0})
    for classes, expected in ((None, 110), (100, 40)):
        found = first_tokens(kind, request, folder, model, temperature=temperature, classes=classes)
        assert found == {expected}


def test_a_server_takes_no_sampling_option_from_the_models_generation_file():
    """Every option that vLLM's server would read from it is in the request."""
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    bent = dict(temperature=0.3, top_p=0.2, top_k=2, min_p=0.5, max_tokens=3)
    bent |= dict(repetition_penalty=3.0, presence_penalty=2.0, frequency_penalty=2.0)
    assert bent.keys() >= CompletionRequest._DEFAULT_SAMPLING_PARAMS.default.keys(), "vLLM reads more than this"
    request = CompletionRequest(model="m", prompt=[1], **Sampling().for_vllm())
    params = request.to_sampling_params(request.max_tokens, bent)
    assert {name: getattr(params, name) for name in bent} == dict(
        temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=256, repetition_penalty=1.0
    ) | dict(presence_penalty=0.0, frequency_penalty=0.0)


def test_stop_strings_without_a_tokenizer_are_an_error():
    with pytest.raises(ValueError, match=r"stop .* needs a tokenizer; pass it, or the model by its name"):
        HFEngine(make_vllm_model(), stop=["w1"])


def test_the_protocol(engine):
    assert isinstance(engine, RolloutEngine)


def test_rollouts_keep_order_prompts_and_the_step(engine):
    engine.sync_weights(make_vllm_model(seed=1), 7)
    rollouts = engine.generate(PROMPTS)
    assert [r.prompt_ids for r in rollouts] == PROMPTS
    assert {r.weights_step for r in rollouts} == {7}
    for rollout in rollouts:
        assert 1 <= len(rollout.completion_ids) <= 16
        assert (rollout.finish_reason == "stop") == (rollout.completion_ids[-1] == EOS)
        assert EOS not in rollout.completion_ids[:-1]
        assert rollout.finish_reason == "stop" or len(rollout.completion_ids) == 16


def test_a_completion_ends_with_its_stop_token(engine):
    """A head that always says EOS: one token, supervised."""
    model = make_vllm_model()
    with torch.no_grad():
        # The last hidden state is normed, so a huge embedding along the mean state wins everywhere.
        hidden = model.base_model(input_ids=torch.tensor([PROMPTS[0]])).last_hidden_state[0, -1]
        model.lm_head.weight[EOS] = hidden * 50
    engine.sync_weights(model, 1)
    (rollout,) = engine.generate([PROMPTS[0]])
    assert rollout.completion_ids == [EOS]
    assert rollout.finish_reason == "stop"


def test_sampling_is_repeatable_and_new_every_round(engine):
    def two_rounds(step):
        engine.sync_weights(make_vllm_model(), step)
        return [[r.completion_ids for r in engine.generate(PROMPTS)] for _ in range(2)]

    first = two_rounds(3)
    assert two_rounds(3) == first
    assert first[0] != first[1]
    assert two_rounds(4) != first


@needs_vllm
@pytest.mark.slow
def test_the_same_prompt_draws_different_completions(vllm):
    vllm.sync_weights(make_vllm_model(), 0)
    completions = {tuple(r.completion_ids) for r in vllm.generate([[1, 2, 3]] * 8)}
    assert len(completions) > 4


@needs_vllm
@pytest.mark.slow
def test_rollouts_of_a_prompt_read_it_once(vllm):
    """Except for what comes after its last whole block."""
    from vllm import SamplingParams

    vllm.llm.reset_prefix_cache()
    prompt = {"prompt_token_ids": [*range(40)]}
    outputs = vllm.llm.generate([prompt] * 3, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    assert [output.num_cached_tokens for output in outputs] == [0, 32, 32]


@needs_vllm
@pytest.mark.slow
def test_more_prompt_tokens_than_one_pass_takes(vllm):
    """On a CPU, seeded requests with a prompt that vLLM splits ended in an error."""
    vllm.sync_weights(make_vllm_model(), 0)
    prompts = [[(i + j) % 110 for j in range(20 + i % 12)] for i in range(400)]
    assert sum(map(len, prompts)) > 8192
    assert len(vllm.generate(prompts)) == 400


@needs_vllm
@pytest.mark.slow
def test_log_probabilities_agree_after_an_optimizer_step_and_a_sync(vllm):
    model = make_vllm_model()
    vllm.sync_weights(model, 0)
    rollouts = vllm.generate([[i, i + 1, i + 2] for i in range(40)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()

    def largest_difference():
        bf16 = make_vllm_model().bfloat16()
        bf16.load_state_dict(model.state_dict())
        sequences = [r.prompt_ids + r.completion_ids for r in rollouts]
        assert sum(map(len, sequences)) > 500
        return max((vllm_logps(vllm, ids) - model_logps(bf16, ids)).abs().max().item() for ids in sequences)

    assert largest_difference() > 0.2, "a skipped sync must show"
    vllm.sync_weights(model, 1)
    assert largest_difference() < 0.05


@needs_vllm
@pytest.mark.slow
def test_greedy_engines_agree(folder, vllm):
    """Same weights, temperature 0: the same tokens, up to bf16's ties."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    hf = HFEngine(model, temperature=0.0, max_completion_length=8)
    vllm.sync_weights(model, 0)
    with sampling(vllm, temperature=0.0):
        ours = vllm.generate(PROMPTS)
    for a, b in zip(ours, hf.generate(PROMPTS), strict=True):
        assert a.completion_ids[:8] == b.completion_ids


@needs_vllm
@pytest.mark.slow
def test_on_policy_steps_through_vllm(tmp_path, tokenizer, pairs, vllm):
    """The trainer starts its own engine from the configuration, beside another running engine."""
    student, teacher = make_vllm_model(), make_vllm_model(1)
    options = dict(lmbda=1.0, rollout_engine="vllm", vllm_enforce_eager=True, max_steps=3)
    options |= dict(max_completion_length=12, max_prompt_length=16)
    last_synced = {}

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            last_synced.update(copy.deepcopy(model.state_dict()))

    trainer = make_trainer(tmp_path, tokenizer, pairs, student, teacher, dict(callbacks=[Keep()]), **options)
    keep_engine(trainer).train()
    engine = trainer.engine
    rollouts = engine.generate([[1, 2], [3, 4]])
    ids = rollouts[0].prompt_ids + rollouts[0].completion_ids
    served = vllm_logps(engine, ids)
    difference_before = (served - model_logps(trainer.model, ids)).abs().max()
    trainer.model.load_state_dict(last_synced)
    now = (served - model_logps(trainer.model, ids)).abs().max()
    assert now < 1e-3 < difference_before, "the engine must have the weights of the last round: not older, not newer"
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(log["completion_length"] > 0 and log["loss"] > 0 for log in logs)
    trainer.close()
    assert trainer.engine is None


def test_the_models_own_generation_file_does_not_bend_the_samples(folder):
    plain = HFEngine(make_vllm_model(), temperature=0.0, max_completion_length=8).generate(PROMPTS)
    bent = make_vllm_model()
    bent.generation_config.repetition_penalty = 5.0
    bent.generation_config.suppress_tokens = [r.completion_ids[0] for r in plain]
    assert HFEngine(bent, temperature=0.0, max_completion_length=8).generate(PROMPTS) == plain
    assert bent.generation_config.repetition_penalty == 5.0, "the student's own file stays"


@needs_vllm
@pytest.mark.slow
def test_a_context_that_the_model_does_not_have_is_one_line(folder):
    with pytest.raises(RolloutConfigError, match=r"^vLLM cannot start: .*40000.*$"):
        VLLMEngine(folder, max_completion_length=39_000, max_prompt_length=1000, enforce_eager=True)


def test_padding_of_a_batch_does_not_change_a_completion(folder):
    alone = HFEngine(folder, temperature=0.0, max_completion_length=8, batch_size=1).generate(PROMPTS)
    together = HFEngine(folder, temperature=0.0, max_completion_length=8, batch_size=4).generate(PROMPTS)
    assert alone == together


def test_a_shared_model_is_not_copied_and_keeps_its_mode(folder):
    model = make_vllm_model().train()
    engine = HFEngine(model, max_completion_length=4)
    engine.generate(PROMPTS)
    assert model.training
    engine.sync_weights(model, 2)
    assert engine.model is model
    assert engine.generate(PROMPTS)[0].weights_step == 2


def test_adapter_weights_are_refused():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(make_vllm_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="belongs to an adapter; pass merged weights"):
        dict(named_weights(adapted))


def test_seeds_of_requests_differ():
    seeds = [s for step in range(20) for round_ in range(3) for s in request_seeds(0, step, round_, 64)]
    assert len(set(seeds)) == len(seeds)
    assert request_seeds(None, 0, 0, 2) == [None, None]


def test_an_engine_without_other_options_says_so():
    class Own(BaseEngine):
        pass

    assert not get_trait(Own, "takes_sampling")
    with pytest.raises(RolloutConfigError, match="Own samples in one way only: it does not define generate_with"):
        Own().generate_with(PROMPTS, Sampling())


def test_stop_strings_of_another_round_need_a_tokenizer(folder):
    engine = HFEngine(AutoModelForCausalLM.from_pretrained(folder))
    with pytest.raises(ValueError, match=r"stop \['w1'\] needs a tokenizer"):
        engine.generate_with(PROMPTS, Sampling(stop=["w1"]))


@needs_vllm
@pytest.mark.slow
def test_vllm_has_the_context_and_the_tokenizer_that_an_evaluation_needs(folder):
    engine = VLLMEngine(folder, max_completion_length=4, max_prompt_length=8, evaluation_context=40)
    assert engine.llm.llm_engine.model_config.max_model_len == 40
    prompts = [[*range(30)]]
    (plain,) = engine.generate_with(prompts, Sampling(temperature=0.0, max_completion_length=10))
    stop = f"w{plain.completion_ids[2]}"
    (stopped,) = engine.generate_with(prompts, Sampling(temperature=0.0, max_completion_length=10, stop=[stop]))
    assert stopped.completion_ids == plain.completion_ids[: plain.completion_ids.index(plain.completion_ids[2]) + 1]
    engine.close()
