"""`sekd rollouts`: a file of the initial student's rollouts, stopped, resumed, and trained on without an engine."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers import make_vllm_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollouts import HFEngine
from sekd.cli import main
from sekd.files import lock_folder
from sekd.on_policy.schedule import RolloutSchedule

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")

FLAGS = ["--round-size", "5", "--max_completion_length", "6", "--seed", "3", "--bf16", "false"]
FLAGS += ["--teacher_dtype", "float32", "--dataset_train_split", "train[:16]"]


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "kept" / "rollouts.jsonl")


def generate(recipe, path, *flags):
    return main(["rollouts", recipe, "--output", path, *FLAGS, *flags])


def read(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def test_rollouts_are_those_of_the_initial_student(recipe, path, tmp_path, capsys):
    """An engine with the student's weights generates the same greedy rollouts, prompt by prompt."""
    assert generate(recipe, path, "--temperature", "0") == 0
    lines = read(path)
    assert len(lines) == 16
    engine = HFEngine(AutoModelForCausalLM.from_pretrained(tmp_path / "student"), 0.0, 6)
    expected = engine.generate([line["prompt_ids"] for line in lines])
    assert [line["completion_ids"] for line in lines] == [rollout.completion_ids for rollout in expected]
    assert [line["finish_reason"] for line in lines] == [rollout.finish_reason for rollout in expected]
    assert {line["weights_step"] for line in lines} == {0}
    assert [line["sample_id"] for line in lines] == [*range(16)]
    cut = sum(line["finish_reason"] == "length" for line in lines)
    printed = capsys.readouterr().out
    assert f"{sum(len(line['completion_ids']) for line in lines):,}, " in printed
    assert f"{cut} (" in printed


def test_every_round_and_every_rollout_of_a_prompt_has_draws_of_its_own(recipe, path, tmp_path):
    assert generate(recipe, path, "--rollouts_per_prompt", "2") == 0
    lines = read(path)
    assert [line["sample_id"] for line in lines] == [i for i in range(16) for _ in range(2)]
    pairs = zip(lines[::2], lines[1::2], strict=True)
    assert sum(a["completion_ids"] != b["completion_ids"] for a, b in pairs) > 12
    assert len({tuple(line["completion_ids"][:2]) for line in lines}) > 16
    other = str(tmp_path / "other.jsonl")
    assert generate(recipe, other, "--rollouts_per_prompt", "2", "--seed", "4") == 0
    same = zip(lines, read(other), strict=True)
    assert sum(a["completion_ids"] == b["completion_ids"] for a, b in same) < 4


@pytest.fixture
def stop_at(monkeypatch):
    """A function that lets Ctrl-C come in the round of this number, counted from 1. It returns the rounds' sizes."""
    generate_with = RolloutSchedule.generate_with

    def stop_at(number):
        rounds = []

        def stop(self, prompts, sampling):
            rounds.append(len(prompts))
            if len(rounds) == number:
                raise KeyboardInterrupt
            return generate_with(self, prompts, sampling)

        monkeypatch.setattr(RolloutSchedule, "generate_with", stop)
        return rounds

    return stop_at


def test_a_stopped_command_resumes(recipe, path, tmp_path, stop_at):
    """Stopped between rounds and in a line of the file, it gives the same file, and no round is generated twice."""
    whole = str(tmp_path / "whole.jsonl")
    assert generate(recipe, whole) == 0
    rounds = stop_at(3)
    assert generate(recipe, path) == 130
    assert not os.path.exists(path)
    with open(f"{path}.part/rollouts.jsonl", "a") as file:
        file.write('{"step": 2, "completion_ids": [1, 2')
    assert generate(recipe, path) == 0
    assert rounds == [5, 5, 5, 5, 1]
    with open(path, "rb") as file, open(whole, "rb") as undisturbed:
        assert file.read() == undisturbed.read()
    assert sorted(os.listdir(tmp_path / "kept")) == ["rollouts.jsonl", "rollouts.jsonl.settings.json"]
    assert generate(recipe, path) == 0
    assert len(rounds) == 5, "a finished file is generated again"


def test_a_file_of_other_settings_is_refused(recipe, path, tmp_path, capsys):
    assert generate(recipe, path) == 0
    before = read(path)
    for flags, words in {
        ("--temperature", "0.5"): "the sampling",
        ("--seed", "4"): "the sampling",
        ("--rollouts_per_prompt", "2"): "rollouts_per_prompt",
        ("--round-size", "9"): "--round-size",
        ("--dataset_train_split", "train[1:17]"): "the prompts",
        ("--sample_fraction", "0.5"): "the prompts",
        ("--model_name_or_path", str(tmp_path / "teacher")): "the student's weights (model_name_or_path",
    }.items():
        assert generate(recipe, path, *flags) == 2
        message = capsys.readouterr().err
        assert f"was begun with another value of {words}" in message
        assert "name another --output" in message
    assert read(path) == before


def test_a_start_that_failed_fixes_no_settings(recipe, path, stop_at):
    stop_at(1)
    assert generate(recipe, path, "--temperature", "0.5") == 130
    assert generate(recipe, path) == 0


def test_the_engine_is_checked_before_models_load(recipe, path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sekd.validation.inputs.is_installed", lambda name: name != "vllm")
    shutil.rmtree(tmp_path / "student")
    AutoTokenizer.from_pretrained(tmp_path / "teacher").save_pretrained(tmp_path / "student")
    shutil.copy(tmp_path / "teacher" / "config.json", tmp_path / "student")
    assert generate(recipe, path, "--rollout_engine", "vllm") == 2
    assert "rollout_engine 'vllm' needs vllm, which is not installed" in capsys.readouterr().err


def test_training_takes_the_whole_file_and_its_longest_prompts(recipe, path, tmp_path):
    assert generate(recipe, path, "--rollouts_per_prompt", "2", "--sample_pool", "6") == 0
    assert len(read(path)) == 12
    flags = ["--rollouts", path, "--sample_pool", "6", "--max_steps", "3", "--per_device_train_batch_size", "4"]
    assert main(["train", recipe, *flags, "--num_train_epochs", "1", "--max_length", "14"]) == 0
    with open(tmp_path / "run" / "metrics.jsonl") as file:
        assert [json.loads(line)["epoch"] for line in file][-1] == 1.0
    samples = ["samples", recipe, "--rollouts", path, "--sample_fraction", "0.5"]
    assert main(samples) == 2


def test_unfinished_rollouts_without_settings_are_generated_again(recipe, path, tmp_path, stop_at):
    """A stopped command's rollouts do not get into a file of another temperature, whose settings were deleted."""
    greedy = str(tmp_path / "greedy.jsonl")
    assert generate(recipe, greedy, "--temperature", "0") == 0
    stop_at(3)
    assert generate(recipe, path) == 130
    assert generate(recipe, path, "--temperature", "0") == 2
    assert len(read(f"{path}.part/rollouts.jsonl")) == 10, "a refused command takes the rollouts away"
    os.remove(f"{path}.settings.json")
    assert generate(recipe, path, "--temperature", "0") == 0
    assert read(path) == read(greedy)


def test_a_finished_file_that_lacks_rollouts_is_refused(recipe, path, capsys):
    assert generate(recipe, path) == 0
    lines = Path(path).read_text().splitlines(keepends=True)
    Path(path).write_text("".join(lines[:5] + lines[7:]))
    assert generate(recipe, path) == 2
    assert "has 14 of 16 rollouts; delete it to generate them again" in capsys.readouterr().err


def test_a_home_folder_is_the_same_in_all_commands(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert generate(recipe, "~/rollouts.jsonl") == 0
    assert len(read(tmp_path / "home" / "rollouts.jsonl")) == 16
    assert main(["train", recipe, "--rollouts", "~/rollouts.jsonl"]) == 0


def test_invalid_commands(recipe, path, tmp_path, capsys, monkeypatch):
    def fails(message, *arguments):
        assert main(["rollouts", recipe, *arguments]) == 2
        assert message in capsys.readouterr().err

    fails("there is no file for the rollouts: add --output FILE")
    assert main(["train", recipe, "--rollouts", path]) == 2
    assert "no such file; `sekd rollouts` generates it" in capsys.readouterr().err
    fails("must name a file that ends with .jsonl", "--output", str(tmp_path / "rollouts.json"))
    fails("--round-size 0 must be at least 1", "--output", path, "--round-size", "0")
    fails("is more than the", "--output", path, "--max_completion_length", "100000", "--rollout_engine", "vllm")
    os.makedirs(os.path.dirname(path))
    with open(path, "w") as file:
        file.write("{}\n")
    fails("exists, and `sekd rollouts` did not generate it", "--output", path)
    assert os.listdir(os.path.dirname(path)) == ["rollouts.jsonl"], "a refused command leaves a folder"
    os.remove(path)
    missing = str(tmp_path / "missing")
    fails("missing': no such folder", "--output", path, "--teacher_model_name_or_path", missing)
    with lock_folder(f"{path}.part", ValueError()):
        fails("another process generates", "--output", path)
    assert main(["train", recipe, "--rollouts", path]) == 2
    assert "is not finished: start the same `sekd rollouts` again" in capsys.readouterr().err


def test_semi_on_policy_3x(recipe, path, tmp_path, capsys):
    """Prompts are chosen once; cache and training take all of their rollouts, and load neither engine nor teacher."""
    keys = yaml.safe_load(Path(recipe).read_text())
    keys |= {"rollouts": path, "teacher_cache": str(tmp_path / "cache"), "class_samples": 16, "max_length": 64}
    keys |= {"sample_fraction": 0.25, "lmbda": 0.0, "position_fraction": 0.2, "max_completion_length": 6}
    Path(recipe).write_text(yaml.safe_dump(keys))
    assert main(["rollouts", recipe]) == 0
    lines = read(path)
    assert len(lines) == 16
    with open(tmp_path / "run" / "samples.json") as file:
        assert sorted({line["sample_id"] for line in lines}) == json.load(file)["kept"]
    assert main(["cache", "build", recipe]) == 0
    assert "16 in 1 shards" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "teacher")
    assert main(["train", recipe, "--rollout_engine", "vllm_server"]) == 0
    with open(tmp_path / "run" / "metrics.jsonl") as file:
        assert "loss" in json.loads(file.readline())


def test_held_out_data_is_not_among_the_prompts(recipe, path, tmp_path, capsys):
    assert generate(recipe, path) == 0
    train = ["train", recipe, "--rollouts", path, "--eval_on_start", "--max_steps", "1"]
    train += ["--dataset_train_split", "train[:16]"]
    assert main([*train, "--dataset_test_split", "train[8:20]"]) == 2
    assert "has rows that dataset_train_split 'train[:16]' trains on" in capsys.readouterr().err
    assert main([*train, "--eval_dataset_name", path]) == 2
    assert "are the held-out data, too" in capsys.readouterr().err
    assert main([*train, "--dataset_test_split", "train[16:20]"]) == 0


def test_a_token_that_the_teacher_lacks_is_refused(recipe, path, tmp_path, capsys):
    """Rollouts may have a class that another teacher lacks."""
    assert generate(recipe, path, "--temperature", "5") == 0
    largest = max(max(line["prompt_ids"] + line["completion_ids"]) for line in read(path))
    make_vllm_model(1, vocab=largest).save_pretrained(tmp_path / "teacher")
    message = f"the data has token id {largest}, and student and teacher have {largest} classes in common"
    flags = ["--rollouts", path]
    for command in (["train", recipe], ["cache", "build", recipe, "--output", str(tmp_path / "cache")]):
        assert main([*command, *flags]) == 2
        assert message in capsys.readouterr().err
    make_vllm_model(1, vocab=largest + 1).save_pretrained(tmp_path / "teacher")
    assert main(["train", recipe, *flags]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=needs_vllm)])
def test_kill_9(recipe, path, tmp_path, tokenizer, engine):
    """Killed twice while it generates, a file equals one that nothing disturbed."""
    make_vllm_model(0).save_pretrained(tmp_path / "student")
    make_vllm_model(1).save_pretrained(tmp_path / "teacher")
    whole = str(tmp_path / "whole.jsonl")
    flags = [*FLAGS, "--rollout_engine", engine, "--vllm_enforce_eager", "true", "--max_prompt_length", "32"]

    def start(output):
        command = [sys.executable, "-m", "sekd.cli", "rollouts", recipe, "--output", output, *flags]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)

    assert start(whole).wait() == 0
    for lines in (1, 11):
        process, part = start(path), f"{path}.part/rollouts.jsonl"
        while process.poll() is None and (not os.path.exists(part) or len(read_whole(part)) < lines):
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(path).wait() == 0
    assert read(path) == read(whole)


def read_whole(path):
    with open(path) as file:
        return [line for line in file if line.endswith("\n")]
