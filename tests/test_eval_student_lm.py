"""The student in a trainer gives lm-eval the numbers that lm-eval's own class gives on the same weights."""

import copy
import json
import random

import pytest
import torch
from accelerate import Accelerator
from helpers import ARCHITECTURES, EOS, VOCAB, WORDS, LargestTensor, add_lora, make_model, make_tokenizer, words

from rollouts import HFEngine, Sampling
from sekd.models import causal_lm
from sekd.on_policy.engines import generate_inside

pytest.importorskip("lm_eval", reason="lm-eval is not installed here")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from sekd.eval.student_lm import StudentLM


def make_lms(model, batch_size=4, tokenizer=None, **options):
    """The student's interface, and lm-eval's own on the same model."""
    tokenizer, processes = tokenizer or make_tokenizer(), Accelerator(cpu=True)
    generate = generate_inside(model, tokenizer, processes, batch_size)
    reference = HFLM(causal_lm(model), tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, **options)
    return StudentLM(model, tokenizer, processes, generate, batch_size, chunk_rows=5), reference


def ask(lm, kind, arguments):
    requests = [Instance(kind, {}, arguments=a, idx=i, metadata=("task", i, 1)) for i, a in enumerate(arguments)]
    return getattr(lm, kind)(requests, disable_tqdm=True)


def make_pairs(count=30):
    """Contexts with several continuations: of one token, of several, the same twice, and without a context."""
    draw = random.Random(0)
    pairs = []
    for _ in range(count // 5):
        context = words(draw, 1, 12)
        pairs += [(context, " " + words(draw, 1, 1)) for _ in range(2)]
        pairs += [(context, " " + words(draw, 2, 5)), pairs[-1], ("", words(draw, 2, 4))]
    return pairs


def greedy_pair(model):
    """A context and the continuation that the model finds likeliest."""
    engine = HFEngine(model, temperature=0.0, max_completion_length=2)
    rollouts = engine.generate([[i, i + 1] for i in range(50)])
    rollout = next(r for r in rollouts if len(r.completion_ids) == 2 and max(r.completion_ids) < WORDS)
    return tuple(" ".join(f"w{i}" for i in ids) for ids in (rollout.prompt_ids, rollout.completion_ids))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_loglikelihoods_are_those_of_lm_eval(kind):
    model = make_model(kind)
    student, reference = make_lms(model)
    student.tokenizer.padding_side = reference.tokenizer.padding_side = "left"
    context, continuation = greedy_pair(model)
    pairs = [*make_pairs(), (context, f" {continuation}")]
    expected = ask(reference, "loglikelihood", pairs)
    answers = ask(student, "loglikelihood", pairs)
    for (logp, is_greedy), (expected_logp, expected_greedy) in zip(answers, expected, strict=True):
        assert logp == pytest.approx(expected_logp, rel=1e-5, abs=1e-5)
        assert is_greedy == expected_greedy
    assert expected[-1][1], "a greedy continuation is among them"
    assert not all(greedy for _, greedy in expected)


def test_loglikelihoods_in_float64_are_equal(float64):
    model = make_model("untied").double()
    student, reference = make_lms(model)
    pairs = make_pairs()
    answers, expected = (ask(lm, "loglikelihood", pairs) for lm in (student, reference))
    assert [a for a, _ in answers] == pytest.approx([e for e, _ in expected], rel=1e-12)


def test_an_adapter_counts_and_modes_stay(tmp_path):
    model = add_lora(make_model("tied"), lora_dropout=0.5)
    student, reference = make_lms(model)
    pairs = make_pairs()
    expected = ask(reference, "loglikelihood", pairs)
    model.eval()
    before, state = {n: m.training for n, m in model.named_modules()}, torch.get_rng_state()
    answers = ask(student, "loglikelihood", pairs)
    assert [a for a, _ in answers] == pytest.approx([e for e, _ in expected], rel=1e-5)
    with model.disable_adapter():
        without = ask(student, "loglikelihood", pairs)
    assert [a for a, _ in without] != pytest.approx([a for a, _ in answers], rel=1e-3)
    assert {n: m.training for n, m in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)


def test_long_contexts_lose_their_beginning_as_in_lm_eval():
    student, reference = make_lms(make_model("untied"))
    student._max_length = reference._max_length = 8
    draw = random.Random(1)
    pairs = [(words(draw, 6, 20), " " + words(draw, 1, 4)) for _ in range(10)]
    answers, expected = (ask(lm, "loglikelihood", pairs) for lm in (student, reference))
    assert [a for a, _ in answers] == pytest.approx([e for e, _ in expected], rel=1e-5)
    texts = [(words(draw, 3, 40),) for _ in range(6)]
    rolling, expected = (ask(lm, "loglikelihood_rolling", texts) for lm in (student, reference))
    assert rolling == pytest.approx(expected, rel=1e-5)


def test_no_logits_of_all_tokens_exist():
    model = make_model("untied")
    student, _ = make_lms(model, batch_size=8)
    draw = random.Random(2)
    pairs = [(words(draw, 60, 60), " w1") for _ in range(8)]
    with LargestTensor() as largest:
        ask(student, "loglikelihood", pairs)
    assert largest.elements < 8 * 60 * VOCAB


@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_outputs_are_those_of_lm_eval(batch_size):
    """With stop strings, a special token among them, and outputs of several lengths."""
    model = make_model("untied")
    student, reference = make_lms(model, batch_size)
    draw = random.Random(3)
    contexts = [words(draw, 1, 10) for _ in range(9)]
    plain = ask(reference, "generate_until", [(c, {"until": [], "max_gen_toks": 12}) for c in contexts])
    stops = [text.split()[3] for text in plain if len(text.split()) > 3]
    options = [
        {"until": [], "max_gen_toks": 12},
        {"until": ["zzz", "yyy", "xxx", "vvv", *stops[:2]], "max_gen_toks": 12, "do_sample": False},
        {"until": stops[2], "max_gen_toks": 7, "temperature": 0.0},
    ]
    requests = [(context, options[i % 3]) for i, context in enumerate(contexts * 2)]
    outputs = ask(student, "generate_until", requests)
    assert outputs == ask(reference, "generate_until", requests)
    assert len({*outputs}) > 5
    assert any(stop in text for text in plain for stop in stops[:2])
    assert not any(stops[0] in output for output in outputs[1::3])


def test_a_special_token_among_the_stop_strings_ends_an_output():
    model = make_model("untied")
    student, _ = make_lms(model)
    sampling = student._make_sampling({"max_gen_toks": 4, "do_sample": False}, ["<pad>", "w1", "<eos>"])
    assert sampling.stop_token_ids == [EOS, 122]
    assert sampling.stop == ["w1"]
    assert sampling == Sampling(0.0, 4, stop_token_ids=[EOS, 122], stop=["w1"])


def test_sampled_outputs_differ_between_requests_and_repeat_with_the_seed():
    model = make_model("untied")
    student, _ = make_lms(model)

    def sample(seed):
        options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "seed": seed}
        return ask(student, "generate_until", [("w1 w2", options)] * 40)

    outputs = sample(1)
    assert len({*outputs}) > 20
    assert sample(1) == outputs
    assert sample(2) != outputs


def test_finished_requests_reach_the_hook():
    student, _ = make_lms(make_model("untied"))
    seen = []

    class Hook:
        def add_partial(self, kind, request, answer):
            seen.append((kind, json.dumps(request), answer))

    student.set_cache_hook(Hook())
    pairs = make_pairs()
    answers = ask(student, "loglikelihood", pairs)
    assert sorted(seen) == sorted(("loglikelihood", json.dumps(p), a) for p, a in zip(pairs, answers, strict=True))
    seen.clear()
    ask(student, "generate_until", [("w1", {"until": [], "max_gen_toks": 2})] * 3)
    assert len(seen) == 3


def test_the_tokenizer_of_the_trainer_stays(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.pad_token = None
    student, _ = make_lms(make_model("untied"), tokenizer=own)
    student.tokenizer.pad_token = "<eos>"
    assert own.pad_token is None
