"""Two processes give the single process's loss and gradient."""

import json

import pytest
import torch
from distributed_worker import TWO_STEPS, gradients, samples
from helpers import VOCAB, make_model, make_trainer, run_two_processes, trained_weights

from sekd import SEKDConfig
from sekd.cache.build import build_cache
from sekd.cache.readers import LocalReader
from sekd.data.prepare import prepare
from sekd.models import freeze

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two processes")]


def test_fsdp2_gives_the_single_process_loss_and_gradient(tmp_path):
    run_two_processes("fsdp2", str(tmp_path / "found.pt"))
    found = torch.load(tmp_path / "found.pt")
    loss, expected = gradients(make_model("untied"), samples(), sequences=4, processes=1)
    torch.testing.assert_close(found["loss"], loss, rtol=1e-5, atol=1e-7)
    for name, gradient in expected.items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6)
    # What a rollout engine would get: every tensor whole, under its checkpoint name.
    for name, tensor in make_model("untied").state_dict().items():
        assert torch.equal(found["weights"][name], tensor)


CHOICES = {
    "top_k": {},
    "random": {"position_policy": "random"},
    "gls": {"position_policy": "gls"},
    "bandit": {"position_policy": "bandit"},
    "pos_rs": {"position_policy": "pos_rs"},
    "rs_kd": {"class_selection": "rs_kd", "class_samples": 8, "sampled_softmax": 40},
    "samples": {"sample_fraction": 0.5, "sample_score": "kl"},
    "cache": {"class_samples": 8, "teacher_cache": "a folder"},
}


@pytest.fixture(scope="module")
def choices(tmp_path_factory, tokenizer, pairs):
    """The choices, with a cache in the folder that they name."""
    folder = tmp_path_factory.mktemp("cache")
    args = SEKDConfig(str(folder / "run"), class_samples=8, disable_tqdm=True)
    reader = LocalReader(freeze(make_model("untied", 1)), VOCAB, args)
    build_cache(prepare(pairs, tokenizer, args), reader, tokenizer, args, str(folder / "cache"))
    return CHOICES | {"cache": CHOICES["cache"] | {"teacher_cache": str(folder / "cache")}}


@pytest.fixture(scope="module")
def found_by_ddp(tmp_path_factory, choices):
    """All runs of two processes in one start."""
    folder = tmp_path_factory.mktemp("ddp")
    run_two_processes("ddp", str(folder), json.dumps(choices))
    return {choice: torch.load(folder / f"{choice}.pt") for choice in choices}


def test_processes_read_disjoint_parts_of_a_cache(found_by_ddp):
    first, second = (set(read) for read in found_by_ddp["cache"]["read"])
    assert first.isdisjoint(second)
    assert len(first) == len(second) == 8, "2 steps of 2 x 2 sequences"


@pytest.mark.parametrize("choice", CHOICES)
def test_ddp_through_the_trainer_gives_the_single_process_steps(
    tmp_path, tokenizer, pairs, choices, found_by_ddp, choice
):
    """Two steps: the second depends on what a policy learned from all processes in the first."""
    found = found_by_ddp[choice]
    options = dict(per_device_train_batch_size=8) | choices[choice]
    evaluation = dict(eval_dataset=pairs.select(range(5)))
    trainer = make_trainer(tmp_path, tokenizer, pairs.select(range(32)), None, None, evaluation, **TWO_STEPS, **options)
    assert found["metrics"] == pytest.approx(trainer.evaluate(), rel=1e-5)
    for name, weight in trained_weights(trainer).items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-6)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    assert len(losses) == 2
