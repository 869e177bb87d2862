"""Two processes give the single process's loss and gradient."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from distributed_worker import LONG_RUNS, RESUMED, TWO_STEPS, twenty_steps
from helpers import VOCAB, make_model, make_trainer, run_command, run_two_processes, save_pair

from sekd import SEKDConfig
from sekd.cache.build import build_cache
from sekd.cache.readers import LocalReader
from sekd.cli import main
from sekd.data.prepare import prepare
from sekd.models import freeze, load_model
from sekd.parse import recipe_folder
from sekd.timing import PARTS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two processes")]


CHOICES = {
    "top_k": {},
    "random": {"position_policy": "random"},
    "gls": {"position_policy": "gls"},
    "bandit": {"position_policy": "bandit"},
    "pos_rs": {"position_policy": "pos_rs"},
    "rs_kd": {"class_selection": "rs_kd", "class_samples": 8, "sampled_softmax": 40},
    "samples": {"sample_fraction": 0.5, "sample_score": "kl"},
    "cache": {"class_samples": 8, "teacher_cache": "a folder"},
    # In FSDP2 the final norm and the head are one unit. A pass of the head is one chunk, or many of 4 positions.
    "fsdp2": {"fsdp2_efficient_loading": True},
    "fsdp2 in chunks": {"fsdp2_efficient_loading": False, "head_chunk_rows": 4},
    "fsdp2 tied": {"fsdp2_efficient_loading": False, "kind": "tied"},
    "fsdp2 tied in chunks": {"fsdp2_efficient_loading": True, "kind": "tied", "head_chunk_rows": 4},
    "fsdp2 gls": {"fsdp2_efficient_loading": False, "position_policy": "gls"},
    "sharded teacher": {"teacher_fsdp": True, "position_score": "kl"},
    "fsdp2, sharded teacher": {"fsdp2_efficient_loading": False, "teacher_fsdp": True, "head_chunk_rows": 4},
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
def found_by_two(tmp_path_factory, choices):
    """All runs of two processes in one start."""
    folder = tmp_path_factory.mktemp("two")
    run_two_processes("trained", str(folder), json.dumps(choices))
    return {choice: torch.load(folder / f"{choice}.pt") for choice in choices} | {"folder": folder}


def test_processes_read_disjoint_parts_of_a_cache(found_by_two):
    first, second = (set(read) for read in found_by_two["cache"]["read"])
    assert first.isdisjoint(second)
    assert len(first) == len(second) == 8, "2 steps of 2 x 2 sequences"


def test_a_run_resumed_in_its_second_epoch_has_the_same_rollouts(found_by_two):
    folder = found_by_two["folder"]
    for name in ("rollouts.jsonl", "rollouts_1.jsonl"):
        undisturbed, resumed = ((folder / run / name).read_text().splitlines() for run in ("undisturbed", "resumed"))
        assert len(undisturbed) == 8 * 2
        assert resumed == undisturbed[6 * 2 :]


@pytest.mark.parametrize("run", RESUMED)
def test_a_run_resumed_in_fsdp2_equals_an_undisturbed_one(found_by_two, run):
    folder = found_by_two["folder"] / run
    undisturbed, resumed = (torch.load(folder / f"{name}.pt") for name in ("undisturbed", "resumed"))
    assert resumed["losses"] == undisturbed["losses"]
    assert len(resumed["losses"]) == 4
    for name, weight in undisturbed["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
    parts = sorted(path.name for path in (folder / "undisturbed/checkpoint-2").glob("*/*.distcp"))
    of_each = ["__0_0.distcp"] * 2 + ["__1_0.distcp"] * 2
    assert parts == (of_each if "shards" in run else []), "of the weights and of the optimizer"
    students = [
        [path.read_bytes() for path in sorted((folder / name).glob("*.safetensors"))]
        for name in ("undisturbed", "resumed")
    ]
    assert students[0] == students[1] != []


def test_every_process_refuses_other_weights(found_by_two):
    first, second = ((found_by_two["folder"] / f"refusal_{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith("the weights of the teacher differ between the 2 processes; give models by name")


def test_accelerate_launch_with_fsdp_trains_as_one_process_does(tmp_path, tokenizer, pairs):
    """With the configuration that sekd ships. On a CPU accelerate takes DDP for FSDP2.

    Its RAM-efficient loading, which is on by default, must not leave the second process without weights. It would be
    seen in the scores of the samples and, since nothing wraps the teacher, in the loss.
    """
    save_pair(tmp_path, tokenizer)
    pairs.to_json(tmp_path / "pairs.jsonl")
    keys = TWO_STEPS | {
        "model_name_or_path": str(tmp_path / "student"),
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "dataset_name": str(tmp_path / "pairs.jsonl"),
        "sample_fraction": 0.5,
        "sample_score": "kl",
        "teacher_dtype": "float32",
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(keys))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"]
    launch += ["--config_file", str(Path(recipe_folder()) / "accelerate" / "fsdp2.yaml"), "-m", "sekd.cli"]
    train = ["train", str(recipe), "--output_dir"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parent.parent)}
    run_command([*launch, *train, str(tmp_path / "two"), "--per_device_train_batch_size=4"], environment)
    assert main([*train, str(tmp_path / "one"), "--per_device_train_batch_size=8"]) == 0

    def read(run):
        logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return logs, json.loads((run / "samples.json").read_text()), load_model(str(run)).state_dict()

    (logs, samples, weights), (expected_logs, expected_samples, expected_weights) = map(
        read, (tmp_path / "two", tmp_path / "one")
    )
    assert samples["kept"] == expected_samples["kept"]
    assert samples["scores"] == pytest.approx(expected_samples["scores"], rel=1e-5)
    for log, expected in zip(logs[:2], expected_logs[:2], strict=True):
        for key in ("loss", "forward_kl_selected", "selected_fraction", "entropy", "entropy_selected"):
            assert log[key] == pytest.approx(expected[key], rel=1e-5), key
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def twenty_by_one(tmp_path_factory):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("one")
    twenty_steps(str(folder / "one"), per_device_train_batch_size=8)
    return folder


@pytest.mark.parametrize("run", LONG_RUNS)
def test_twenty_steps_choose_and_learn_as_one_process_does(twenty_by_one, found_by_two, run):
    expected, folder = torch.load(twenty_by_one / "one.pt"), found_by_two["folder"]
    together = torch.load(folder / f"{run}.pt")
    first, second = together["chosen"]
    assert first.keys().isdisjoint(second)
    assert len(first) == len(second) == 20 * 4
    assert first | second == expected["chosen"][0]
    assert together["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert sorted(path.name for path in (folder / run).iterdir()) == sorted(
        path.name for path in (twenty_by_one / "one").iterdir()
    ), "one student, and nothing of the second process"
    weights = load_model(str(folder / run)).state_dict()
    for name, weight in load_model(str(twenty_by_one / "one")).state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("choice", CHOICES)
def test_two_processes_give_the_single_process_steps(tmp_path, tokenizer, pairs, choices, found_by_two, choice):
    """Two steps: the second depends on what a policy learned from all processes in the first."""
    found = found_by_two[choice]
    options = dict(per_device_train_batch_size=8) | choices[choice]
    student, _ = make_model(options.pop("kind", "untied")), options.pop("fsdp2_efficient_loading", None)
    options.pop("teacher_fsdp", None)
    data, evaluation = pairs.select(range(32)), dict(eval_dataset=pairs.select(range(5)))
    trainer = make_trainer(tmp_path, tokenizer, data, student, None, evaluation, **TWO_STEPS, **options)
    trainer.train()
    weights = student.state_dict()
    assert found["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-6)
    assert found["metrics"] == pytest.approx(trainer.evaluate(), rel=1e-5)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    assert len(losses) == 2
    logs = [log for log in found["logs"] if "loss" in log]
    assert all(sum(value for name, value in log.items() if name.endswith("_share")) > 0 for log in logs)
    assert all(sum(log.get(f"{part}_share", 0) for part in PARTS) <= 1 for log in logs), "means over the processes"
