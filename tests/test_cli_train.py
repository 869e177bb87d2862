"""`sekd train`, from a recipe to a student."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import EOS, make_model
from transformers import AutoModelForCausalLM

from sekd.cli import main


@pytest.mark.parametrize("lmbda", ["0", "1"])
def test_train_end_to_end(recipe, tmp_path, lmbda, capsys):
    assert main(["train", recipe, "--lmbda", lmbda]) == 0
    run = tmp_path / "run"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["lmbda"] == float(lmbda)
    for name in ("tokenizer.json", "versions.json", "model.safetensors", "checkpoint-2", "checkpoint-4"):
        assert (run / name).exists()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()] == [2, 4, 4]
    student = AutoModelForCausalLM.from_pretrained(run)
    assert not torch.equal(student.lm_head.weight, make_model("untied").lm_head.weight)
    assert str(run) in capsys.readouterr().out


def test_train_evaluates_on_a_slice(recipe, tmp_path):
    flags = ["--eval_on_start", "true", "--eval_strategy", "steps", "--eval_steps", "4"]
    flags += ["--dataset_train_split", "train[8:]", "--dataset_test_split", "train[:8]"]
    assert main(["train", recipe, *flags]) == 0
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    before, after = [log["eval_forward_kl"] for log in logs if "eval_forward_kl" in log]
    assert after < before


@pytest.fixture
def rollouts(tmp_path):
    """A file as save_rollouts writes it."""
    rows = [{"prompt_ids": [i, i + 1], "completion_ids": [i + 2, EOS], "sample_id": i, "step": 0} for i in range(8)]
    words = [{"completion": f"w{i + 2} <eos>"} for i in range(8)]
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row | word) + "\n" for row, word in zip(rows, words, strict=True)))
    return str(path)


def test_rollouts_are_replayed_in_the_place_of_the_data(recipe, rollouts, tmp_path):
    flags = ["--lmbda", "1", "--dataset_config", "main", "--dataset_train_split", "x", "--dataset_streaming", "true"]
    keys = yaml.safe_load(Path(recipe).read_text())
    del keys["dataset_name"]
    Path(recipe).write_text(yaml.safe_dump(keys))
    assert main(["train", recipe, *flags]) == 2
    assert main(["train", recipe, *flags, "--rollouts", rollouts]) == 0
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (written["lmbda"], written["divergence"], written["rollouts"]) == (0, "reverse_kl", rollouts)
    as_data = ["--dataset_name", rollouts, "--sample_fraction", "0.5"]
    assert main(["samples", recipe, *as_data]) == 0
    assert len(json.loads((tmp_path / "run" / "samples.json").read_text())["kept"]) == 4


def test_replayed_rollouts_are_evaluated_on_data_of_their_own(recipe, rollouts, tmp_path, capsys):
    flags = ["--rollouts", rollouts, "--eval_on_start", "true", "--max_steps", "2"]
    flags += ["--dataset_train_split", "train[8:]"]
    assert main(["train", recipe, *flags, "--dataset_test_split", "train[:8]"]) == 0
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").open()][:8]
    positions = sum(len(row["completion"].split()) + 1 for row in pairs)
    assert [log["eval_positions"] for log in logs if "eval_positions" in log] == [positions]
    keys = yaml.safe_load(Path(recipe).read_text())
    del keys["dataset_name"]
    keys["output_dir"] += "_2"
    Path(recipe).write_text(yaml.safe_dump(keys))
    assert main(["train", recipe, *flags]) == 2
    assert "evaluation needs data of its own: set eval_dataset_name" in capsys.readouterr().err


def test_files_that_are_no_rollouts(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("nowhere", "nowhere': no such file"),
        ("empty.jsonl", "empty.jsonl is empty"),
        (
            "pairs.jsonl",
            "rollouts 'pairs.jsonl' lacks the columns prompt_ids and completion_ids: generate it with `sekd rollouts`",
        ),
        ("", "rollouts is empty; name a path, or leave it out"),
    ):
        (tmp_path / "empty.jsonl").write_text("")
        assert main(["train", recipe, "--rollouts", name]) == 2
        assert message in capsys.readouterr().err


def test_resume_from_the_last_checkpoint(recipe, tmp_path):
    assert main(["train", recipe, "--max_steps", "2", "--lr_scheduler_type", "constant"]) == 0
    assert main(["train", recipe, "--lr_scheduler_type", "constant", "--resume_from_checkpoint", "true"]) == 0
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "run").lm_head.weight
    whole_run = ["--lr_scheduler_type", "constant", "--output_dir", str(tmp_path / "whole")]
    assert main(["train", recipe, *whole_run]) == 0
    assert torch.equal(resumed, AutoModelForCausalLM.from_pretrained(tmp_path / "whole").lm_head.weight)


def test_the_written_recipe_holds_a_schedule_and_resumes_with_it(recipe, tmp_path, capsys):
    steps = {0: 1.0, 4: 0.2}
    options = ["--max_steps", "6", "--logging_steps", "1", "--save_steps", "3"]
    assert main(["train", recipe, "--position_fraction", "{0: 1.0, 4: 0.2}", *options]) == 0
    written = tmp_path / "run" / "recipe.yaml"
    assert yaml.safe_load(written.read_text())["position_fraction"] == steps

    def read(folder):
        logs = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").open()]
        return [{k: log[k] for k in ("step", "loss", "position_fraction")} for log in logs if "loss" in log]

    resume = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-3"), "--output_dir"]
    assert main(["train", str(written), *resume, str(tmp_path / "resumed")]) == 0
    assert read("resumed") == read("run")
    assert [log["position_fraction"] for log in read("run")] == [1.0] * 4 + [0.2] * 2
    whole, resumed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("run", "resumed"))
    assert torch.equal(whole.lm_head.weight, resumed.lm_head.weight)
    capsys.readouterr()
    other = ["--position_fraction", "{0: 1.0, 5: 0.2}", *resume, str(tmp_path / "other")]
    assert main(["train", str(written), *other]) == 2
    assert "differs in position_fraction {0: 1.0, 5: 0.2} (it has {0: 1.0, 4: 0.2});" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGTERM, 143, "sekd: stopped by SIGTERM after step "),
        (signal.SIGINT, 130, "sekd: stopped after step "),
    ],
)
def test_a_signal_ends_with_one_line_and_the_command_that_resumes(recipe, tmp_path, capsys, number, status, message):
    def send():
        while not (tmp_path / "run" / "checkpoint-4").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    assert main(["train", recipe, "--max_steps", "100000", "--disable_tqdm", "true"]) == status
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(message)
    assert last.endswith(f"sekd train {recipe} --max_steps 100000 --disable_tqdm true --resume_from_checkpoint true")
    step = re.search(r"the newest checkpoint is of step (\d+)", last)[1]
    assert (tmp_path / "run" / f"checkpoint-{step}").exists()
    assert (f"after step {step}," in last) == (number == signal.SIGTERM)


@pytest.mark.slow
def test_errors_of_resuming_are_one_line(recipe, tmp_path, capsys):
    assert main(["train", recipe]) == 0
    os.remove(tmp_path / "run" / "checkpoint-4" / "optimizer.pt")
    for flags, status, message in (
        ([], 2, "has the results of an earlier run"),
        (
            ["--resume_from_checkpoint", "true", "--learning_rate", "1"],
            2,
            "differs in learning_rate 1.0 (it",
        ),
        (["--resume_from_checkpoint", "true", "--max_steps", "1"], 2, "is of step 2, but max_steps"),
        (["--resume_from_checkpoint", str(tmp_path / "nowhere")], 2, "there is no such folder"),
        (["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-4")], 2, "damaged: optimizer.pt is missing"),
        (["--resume_from_checkpoint", "true"], 0, ""),
        (["--resume_from_checkpoint", "true"], 0, ""),
    ):
        assert main(["train", recipe, *flags]) == status, flags
        errors = capsys.readouterr().err
        assert message in errors
        assert "Traceback" not in errors
