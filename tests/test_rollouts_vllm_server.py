"""The server engine against a real vLLM server, also when it misbehaves, dies or is restarted."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
import yaml
from distributed_worker import SERVED as TWO_PROCESSES
from helpers import EOS, make_tokenizer, make_trainer, make_vllm_model, run_two_processes, trained_weights
from rollout_helpers import PROMPTS, SAID, check_parity, check_syncs, logps, make_lora, model_logps, say
from serving import Faulty, Server, spoil_error, spoil_fewer, spoil_garbage, spoil_hang, spoil_other_prompt

from rollouts import HFEngine, RolloutEngine, RolloutError, VLLMEngine, VLLMServerEngine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("a server"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    make_vllm_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    server = Server(folder)
    yield server
    server.kill()


@pytest.fixture
def connect(server, tmp_path):
    """A function that makes an engine of the server, or of other addresses, and closes the one before."""
    engines = []

    def make(*urls, **options):
        for engine in engines:
            engine.close()
        settings = dict(weights_folder=str(tmp_path / "weights"), max_completion_length=16, max_prompt_length=32)
        settings |= dict(stop_token_ids=[EOS], timeout=240.0)
        engines.append(VLLMServerEngine(urls or server.url, **settings | options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def largest_difference(engine, model, sequences):
    bf16 = make_vllm_model().bfloat16()
    bf16.load_state_dict(model.state_dict())
    served = [logps(engine, ids) for ids in sequences]
    return max((s - model_logps(bf16, ids)).abs().max().item() for s, ids in zip(served, sequences, strict=True))


def test_log_probabilities_agree_after_a_sync_and_not_without(connect, tmp_path):
    engine, model = connect(), make_vllm_model(3)
    assert isinstance(engine, RolloutEngine)
    engine.sync_weights(model, 0)
    sequences = [r.prompt_ids + r.completion_ids for r in engine.generate([[i, i + 1, i + 2] for i in range(40)])]
    assert sum(map(len, sequences)) > 500
    assert largest_difference(engine, model, sequences) < 0.05
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    assert largest_difference(engine, model, sequences) > 0.2, "a skipped sync must show"
    engine.sync_weights(model, 1)
    assert largest_difference(engine, model, sequences) < 0.05
    assert len(list((tmp_path / "weights").iterdir())) == 1, "old weights are removed"
    engine.close()
    assert not list((tmp_path / "weights").iterdir())


def test_merged_copies_over_http(connect):
    """vLLM does not apply DoRA."""
    engine, model = connect(), make_lora(use_dora=True)
    check_parity(engine, model)
    check_syncs(engine, model)


def test_stop_strings_and_log_probabilities_over_http(connect):
    """Two tokens with the same text have an entry each, and the sampled token is not one of the likeliest."""
    model = make_vllm_model(1)
    plain = connect()
    plain.sync_weights(model, 4)
    expected = plain.generate(PROMPTS)
    stop = next(t for t in expected[0].completion_ids[2:-1] if 20 <= t < 100)
    engine = connect(stop=[f"w{stop}"], top_logprobs=5)
    engine.sync_weights(model, 4)
    rollout, *_ = engine.generate(PROMPTS)
    end = expected[0].completion_ids.index(stop) + 1
    assert rollout.completion_ids == expected[0].completion_ids[:end]
    assert rollout.finish_reason == "stop"
    with torch.no_grad():
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        logp = make_vllm_model(1).bfloat16()(input_ids=ids).logits[0].float().log_softmax(-1)
    top = logp[len(rollout.prompt_ids) - 1 : -1].topk(5).values
    torch.testing.assert_close(torch.from_numpy(rollout.top_logprobs), top, atol=0.03, rtol=0)


def test_rollouts_are_in_order_repeatable_and_stop(connect):
    engine = connect()

    def two_rounds(step):
        engine.sync_weights(make_vllm_model(1), step)
        return [engine.generate(PROMPTS * 5) for _ in range(2)]

    first, second = two_rounds(7)
    assert [r.prompt_ids for r in first] == PROMPTS * 5
    assert {r.weights_step for r in first} == {7}
    assert [r.completion_ids for r in first] != [r.completion_ids for r in second]
    assert two_rounds(7) == [first, second]
    for rollout in first + second:
        assert (rollout.finish_reason == "stop") == (rollout.completion_ids[-1] == EOS)
        assert EOS not in rollout.completion_ids[:-1]


def test_a_server_that_failed_to_load_is_refused_until_it_is_restarted(connect, server):
    """vLLM reports no error and keeps some of the old weights: log-probabilities were off by 0.5 and more."""
    with pytest.raises(ValueError, match="cannot load the student's weights: it serves another model"):
        connect().sync_weights(make_vllm_model(vocab=256), 0)
    with pytest.raises(ValueError, match="failed to load weights and may still have some of the old ones; restart it"):
        connect().sync_weights(make_vllm_model(5), 0)
    server.restart("--dtype", "float32")
    engine, model = connect(), make_vllm_model(5)
    engine.sync_weights(model, 1)
    assert largest_difference(engine, model, [list(range(1, 60))]) < 0.05


def test_greedy_tokens_of_all_engines_are_the_same(server, connect, tmp_path):
    """In float32, without near ties: with a penalty, and with stop strings."""
    model = make_vllm_model(1)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    if "float32" not in server.options:
        server.restart("--dtype", "float32")
    prompts = [[i, i + 3, i + 5][: 1 + i % 3] for i in range(20)]
    options = dict(
        temperature=0.0, max_completion_length=16, repetition_penalty=1.2, stop=[f"w{i}" for i in range(20, 100, 9)]
    )
    local = VLLMEngine(str(tmp_path / "model"), dtype="float32", max_prompt_length=32, enforce_eager=True, **options)
    engines = [HFEngine(str(tmp_path / "model"), **options), local, connect(**options)]
    rollouts = []
    for engine in engines:
        engine.sync_weights(model, 1)
        rollouts.append(engine.generate(prompts))
        engine.close()
    assert rollouts[0] == rollouts[1] == rollouts[2]
    assert {r.finish_reason for r in rollouts[0]} == {"stop", "length"}


FAULTS = [spoil_error, spoil_garbage, spoil_fewer, spoil_other_prompt, spoil_hang]


@pytest.mark.parametrize("fault", FAULTS)
def test_spoiled_answers_are_requested_again(connect, server, fault):
    """Every third of the first 12 answers is spoiled; the rollouts are the same as from a good server."""
    good = connect()
    good.sync_weights(make_vllm_model(1), 2)
    expected = good.generate(PROMPTS * 3)
    faulty = Faulty(server.url, lambda n, s, c: fault(c) if n <= 12 and n % 3 == 0 else (s, c))
    engine = connect(faulty.url, request_timeout=3.0)
    engine.sync_weights(make_vllm_model(1), 2)
    assert engine.generate(PROMPTS * 3) == expected
    assert faulty.asked > 12, "spoiled answers were requested again"
    faulty.shutdown()


@pytest.mark.parametrize("fault", [spoil_error, spoil_hang])
@pytest.mark.parametrize("first", [True, False])
def test_a_good_server_answers_for_one_that_stays_faulty(connect, server, fault, first):
    """Also if the faulty server hangs for as long as a round may take."""
    good = connect()
    good.sync_weights(make_vllm_model(1), 2)
    expected = good.generate(PROMPTS)
    faulty = Faulty(server.url, lambda n, s, c: fault(c))
    urls = [faulty.url, server.url] if first else [server.url, faulty.url]
    engine = connect(*urls, request_timeout=2.0)
    engine.timeout = 2.0
    engine.sync_weights(make_vllm_model(1), 2)
    assert engine.generate(PROMPTS) == expected
    faulty.shutdown()


def test_a_server_that_stays_faulty_is_named(connect, server):
    faulty = Faulty(server.url, lambda n, s, c: spoil_error(c))
    engine = connect(faulty.url)
    engine.sync_weights(make_vllm_model(1), 2)
    engine.timeout = 2.0
    with pytest.raises(RolloutError, match=r"missing completions within 2 s.*127.0.0.1.*answered 500.*out of memory"):
        engine.generate(PROMPTS)
    faulty.shutdown()


def test_a_dead_server_leaves_its_share_to_the_other(connect, server):
    faulty = Faulty(server.url, lambda n, s, c: (s, c))
    engine = connect(server.url, faulty.url)
    engine.sync_weights(make_vllm_model(1), 2)
    expected = engine.generate(PROMPTS * 3)
    assert 0 < faulty.asked < 12, "both took part"
    engine.sync_weights(make_vllm_model(1), 2)
    faulty.shutdown()
    assert engine.generate(PROMPTS * 3) == expected


def test_what_is_wrong_at_the_start_is_named(connect, server, tmp_path, tokenizer, pairs):
    with pytest.raises(RolloutError, match=r"rollout server http://127.0.0.1:9 did not answer within 1 s .*; start it"):
        connect("http://127.0.0.1:9", timeout=1.0)
    with pytest.raises(
        ValueError, match=r"has a context of 64 tokens, .* take up to 132; start it with --max-model-len 132"
    ):
        connect(max_prompt_length=100, max_completion_length=32)
    with pytest.raises(ValueError, match=r"gives 20 log-probabilities per token, and 30 are .* --max-logprobs 30"):
        connect(top_logprobs=30)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"\"nccl\" sends from GPU to GPU, and the trainer has none; use \"file\""):
            connect(transfer="nccl")
    with pytest.raises(ValueError, match=r"takes 64 stop strings, and there are 65; .* VLLM_MAX_STOP_STRINGS=65"):
        connect(stop=[str(i) for i in range(65)])
    options = dict(lmbda=1.0, rollout_engine="vllm_server", rollout_server_urls=[server.url], max_prompt_length=32)
    wider = make_vllm_model(intermediate=128)  # vLLM takes the weights that fit, without an error
    with torch.no_grad():
        for layer in wider.model.layers:
            layer.mlp.down_proj.weight.mul_(50)
    trainer = make_trainer(tmp_path, tokenizer, pairs, wider, make_vllm_model(2), **options)
    with pytest.raises(ValueError, match=r"computes other probabilities than the student .* it serves another model"):
        trainer.train()


SERVED = dict(lmbda=1.0, rollout_engine="vllm_server", max_completion_length=8, max_prompt_length=16, temperature=1.0)


def served_trainer(folder, server, tokenizer, pairs, callbacks=(), **choices):
    options = SERVED | dict(rollout_server_urls=[server.url], per_device_train_batch_size=2, rollout_timeout=240.0)
    models = make_vllm_model(), make_vllm_model(1)
    return make_trainer(folder, tokenizer, pairs, *models, dict(callbacks=[*callbacks]), **options | choices)


def test_30_steps_with_a_restart_are_30_steps_without(tmp_path, server, tokenizer, pairs):
    """The same weights, losses and rollouts. The server is killed and restarted between the answers of a round, which
    are all discarded."""
    options, killed = dict(max_steps=30, save_rollouts=True), []

    def kill(number, status, content):
        if number == 31:
            server.restart()
            killed.append(number)
        return status, content

    runs = {}
    for name, between in (("plain", None), ("cut", Faulty(server.url, kill))):
        urls = [server.url if between is None else between.url]
        trainer = served_trainer(tmp_path / name, server, tokenizer, pairs, **options, rollout_server_urls=urls)
        weights = trained_weights(trainer)
        trainer.close()
        rollouts = (tmp_path / name / "rollouts.jsonl").read_text()
        runs[name] = weights, rollouts, [log["loss"] for log in trainer.state.log_history if "loss" in log]
    between.shutdown()
    assert killed == [31]
    assert len(runs["plain"][1].splitlines()) == 60
    assert runs["plain"][1] == runs["cut"][1]
    for name, weight in runs["plain"][0].items():
        torch.testing.assert_close(runs["cut"][0][name], weight, rtol=1e-5, atol=1e-6)
    assert runs["plain"][2] == pytest.approx(runs["cut"][2], rel=1e-5)


def test_a_run_whose_server_is_gone_stops_with_a_checkpoint_and_resumes(tmp_path, server, tokenizer, pairs):
    undisturbed = served_trainer(tmp_path / "whole", server, tokenizer, pairs, max_steps=6)
    whole = trained_weights(undisturbed)
    undisturbed.close()
    gone = Faulty(server.url, lambda n, s, c: spoil_error(c) if n > 6 else (s, c))
    options = dict(max_steps=6, rollout_server_urls=[gone.url], rollout_timeout=2.0)
    trainer = served_trainer(tmp_path / "cut", server, tokenizer, pairs, **options)
    with pytest.raises(RolloutError, match="answered 500"):
        trainer.train()
    (checkpoint,) = (tmp_path / "cut").glob("checkpoint-*")
    assert 0 < trainer.state.global_step < 6
    assert checkpoint.name == f"checkpoint-{trainer.state.global_step}"
    fresh = served_trainer(tmp_path / "fresh", server, tokenizer, pairs, **options)
    with pytest.raises(RolloutError, match="answered 500"):
        fresh.evaluate(pairs.select(range(2)))
    fresh.close()
    assert not list((tmp_path / "fresh").glob("checkpoint-*")), "nothing was trained"
    resumed = served_trainer(tmp_path / "cut", server, tokenizer, pairs, max_steps=6)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, weight in resumed.model.named_parameters():
        torch.testing.assert_close(weight.detach(), whole[name], rtol=1e-5, atol=1e-6)
    resumed.close()
    gone.shutdown()


def test_a_second_trainer_is_refused(connect, server, tmp_path):
    first = connect(max_completion_length=8)
    first.sync_weights(make_vllm_model(1), 0)
    folder = str(tmp_path / "second" / "weights")
    second = VLLMServerEngine(server.url, weights_folder=folder, max_completion_length=8, max_prompt_length=32)
    with pytest.raises(ValueError, match=f"has the weights of the run in {tmp_path}, which is still running"):
        second.sync_weights(make_vllm_model(2), 0)
    expected = first.generate(PROMPTS)
    first.close()
    second.sync_weights(make_vllm_model(2), 0)
    assert second.generate(PROMPTS) != expected
    second.close()


def test_no_class_that_the_teacher_lacks_is_drawn(connect):
    """The student nearly always says 110; the likeliest of the first 100 tokens takes its place."""
    model = say(make_vllm_model(1), {110: 30.0, 40: 15.0})
    for classes, expected in ((None, 110), (100, 40)):
        engine = connect(classes=classes, max_completion_length=1)
        engine.sync_weights(model, 0)
        assert {r.completion_ids[0] for r in engine.generate([SAID] * 20)} == {expected}


def test_two_processes_share_a_server(tmp_path, server, tokenizer, pairs):
    """The same three steps as with one process."""
    run_two_processes("served", str(tmp_path / "two"), server.url)
    options = TWO_PROCESSES | dict(rollout_server_urls=[server.url], per_device_train_batch_size=4)
    one = make_trainer(tmp_path, tokenizer, pairs, make_vllm_model(), make_vllm_model(1), **options)
    two = torch.load(tmp_path / "two.pt")
    for name, weight in trained_weights(one).items():
        torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-6)
    one.close()


RAISES = """
import sys
from transformers import TrainerCallback
from sekd.recipe import Run

class Raise(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("as it happens")

trainer = Run.parse(sys.argv[1]).trainer()
trainer.add_callback(Raise())
trainer.train()
"""


@pytest.mark.parametrize(
    ("engine", "how"), [("vllm", "Ctrl-C"), ("vllm_server", "Ctrl-C"), ("vllm_server", "exception")]
)
def test_a_run_that_is_stopped_leaves_nothing(request, tmp_path, server, tokenizer, pairs, engine, how):
    """Ctrl-C, or an error, in a long round: neither processes nor files of weights are left."""
    for name, seed in (("student", 0), ("teacher", 1)):
        make_vllm_model(seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    pairs.to_json(tmp_path / "pairs.jsonl")
    slow = Faulty(server.url, lambda n, s, c: (time.sleep(120 * (n > 8)), (s, c))[1])
    recipe = dict(
        output_dir=str(tmp_path / "run"),
        model_name_or_path=str(tmp_path / "student"),
        teacher_model_name_or_path=str(tmp_path / "teacher"),
        dataset_name=str(tmp_path / "pairs.jsonl"),
        rollout_engine=engine,
        rollout_server_urls=[slow.url],
        **dict(lmbda=1.0, max_steps=100_000, max_completion_length=8, max_prompt_length=16, report_to="none"),
        **dict(learning_rate=1e-6, logging_steps=1, save_strategy="no", per_device_train_batch_size=4),
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "sekd.cli", "train", str(tmp_path / "recipe.yaml")]
    if how == "exception":
        command = [sys.executable, "-c", RAISES, str(tmp_path / "recipe.yaml")]
    with open(tmp_path / "log", "w") as log:
        # A shell makes the tests ignore Ctrl-C if it runs them in the background.
        restore = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=restore
        )
    request.addfinalizer(process.kill)
    if how == "Ctrl-C":
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.2)
        time.sleep(1)
        if engine == "vllm":  # the process itself ends vLLM's processes
            process.send_signal(signal.SIGINT)
        else:
            os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == (130 if how == "Ctrl-C" else 1), (tmp_path / "log").read_text()[-2000:]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert not list((tmp_path / "run").glob("rollout_weights/*"))
    slow.shutdown()
