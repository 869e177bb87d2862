"""Recipes and overrides become objects; mistakes become one clear line."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import EOS, make_model, make_vllm_model, save_pair
from transformers import AutoModelForCausalLM

from sekd.callbacks import as_recipe
from sekd.cli import main, parse_recipe, recipe_folder


@pytest.fixture
def recipe(tmp_path, tokenizer, pairs):
    """A recipe that runs here in seconds."""
    save_pair(tmp_path, tokenizer)
    pairs.to_json(tmp_path / "pairs.jsonl")
    keys = {
        "output_dir": str(tmp_path / "run"),
        "model_name_or_path": str(tmp_path / "student"),
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "dataset_name": str(tmp_path / "pairs.jsonl"),
        "rollout_engine": "hf",
        "max_completion_length": 4,
        "max_steps": 4,
        "logging_steps": 2,
        "save_steps": 2,
        "learning_rate": "1e-3",
        "report_to": "none",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    return str(path)


def test_the_command_line_beats_the_file(recipe):
    script, args, model = parse_recipe(recipe, ["--max_steps", "7", "--learning_rate=2e-6", "--use_peft", "true"])
    assert (args.max_steps, args.learning_rate, model.use_peft) == (7, 2e-6, True)
    assert args.logging_steps == 2
    assert script.dataset_name.endswith("pairs.jsonl")


def test_unknown_keys_name_the_nearest_known_one(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"unknown key 'positon_fraction' in the command line; .* 'position_fraction'"):
        parse_recipe(recipe, ["--positon_fraction", "0.1"])
    with open(recipe, "a") as file:
        file.write("teacher_model: x\n")
    with pytest.raises(ValueError, match=r"unknown key 'teacher_model' in the recipe; .* 'teacher_"):
        parse_recipe(recipe)


def test_bad_recipes(tmp_path, recipe):
    with pytest.raises(ValueError, match=r"'nowhere.yaml': no such file"):
        parse_recipe("nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match=r"is not a mapping"):
        parse_recipe(str(tmp_path / "list.yaml"))
    with pytest.raises(ValueError, match=r"position_fraction.*invalid float value: 'twenty'"):
        parse_recipe(recipe, ["--position_fraction", "twenty"])
    with pytest.raises(ValueError, match=r"position_fraction 2.0 is outside \(0, 1\]"):
        parse_recipe(recipe, ["--position_fraction", "2"])


def test_a_recipe_as_run_reads_the_same(recipe, tmp_path):
    records = parse_recipe(recipe, ["--lmbda", "0.5", "--max_steps", "9"])
    (tmp_path / "again.yaml").write_text(as_recipe(*records))
    assert "position_fraction: 0.2" in (tmp_path / "again.yaml").read_text(), "defaults are spelled out"
    for ours, theirs in zip(parse_recipe(str(tmp_path / "again.yaml")), records, strict=True):
        assert as_recipe(ours) == as_recipe(theirs)


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
    assert main(["samples", recipe, *flags, "--rollouts", rollouts, "--sample_fraction", "0.5"]) == 0
    assert len(json.loads((tmp_path / "run" / "samples.json").read_text())["kept"]) == 4


def test_replayed_rollouts_are_evaluated_on_data_of_their_own(recipe, rollouts, tmp_path, capsys):
    flags = ["--rollouts", rollouts, "--eval_on_start", "true", "--max_steps", "2"]
    assert main(["train", recipe, *flags, "--dataset_test_split", "train[:8]"]) == 0
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").open()][:8]
    rows = sum(len(row["completion"].split()) + 1 for row in pairs)
    assert [log["eval_rows"] for log in logs if "eval_rows" in log] == [rows]
    keys = yaml.safe_load(Path(recipe).read_text())
    del keys["dataset_name"]
    Path(recipe).write_text(yaml.safe_dump(keys))
    assert main(["train", recipe, *flags]) == 2
    assert "evaluation needs data of its own: set eval_dataset_name" in capsys.readouterr().err


def test_files_that_are_no_rollouts(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("nowhere", "nowhere': no such file"),
        ("empty.jsonl", "empty.jsonl is empty"),
        ("pairs.jsonl", "rollouts 'pairs.jsonl' lacks the columns prompt_ids and completion_ids: write it with save_"),
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_stepz", "3"], "unknown key 'max_stepz' in the command line; the nearest known one is 'max_steps'"),
        (["--dataset_name", "nowhere.jsonl"], "dataset_name 'nowhere.jsonl': no such file"),
        (["--prompt_column", "question"], "its columns are 'prompt', 'completion'"),
        (["--max_prompt_length", "3"], "prompts are longer than max_prompt_length 3; raise it to 8"),
        (["--resume_from_checkpoint", "true"], "there is no checkpoint in output_dir"),
        (["--eval_strategy", "steps"], "evaluation needs data of its own: set eval_dataset_name"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(recipe, flags, message, capsys):
    assert main(["train", recipe, *flags]) == 2
    assert message in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    for command in ("train", "demo"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"  sekd {command} " in capsys.readouterr().out


def test_nothing_heavy_is_imported_at_start_up():
    code = (
        "import sys, sekd.cli, sekd.trainer; "
        "bad = [m for m in sys.modules if m == 'vllm' or m.startswith('trl.trainer.') and m.endswith('_trainer')]; "
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_recipe_folder():
    assert "demo.yaml" in os.listdir(recipe_folder())


@pytest.mark.slow
def test_ctrl_c_ends_everything(recipe, tmp_path):
    """SIGINT in the middle of an on-policy run through vLLM: status 130, and no process of its group is left."""
    make_vllm_model(0).save_pretrained(tmp_path / "student")
    make_vllm_model(1).save_pretrained(tmp_path / "teacher")
    engine = "vllm" if importlib.util.find_spec("vllm") else "hf"
    command = [sys.executable, "-m", "sekd.cli", "train", recipe, "--lmbda", "1", "--rollout_engine", engine]
    command += ["--vllm_enforce_eager", "true"]
    process = subprocess.Popen(
        [*command, "--max_steps", "100000", "--save_strategy", "no"],
        start_new_session=True,
        # A job in the background inherits an ignored SIGINT, which Python would leave ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        for _ in range(1200):
            if metrics.exists() and metrics.stat().st_size > 0:
                break
            assert process.poll() is None, "it ended before it trained"
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_samples_chooses_once_and_train_uses_the_choice(recipe, tmp_path, capsys, monkeypatch):
    flags = ["--sample_fraction", "0.25"]
    assert main(["samples", recipe, *flags]) == 0
    shown = capsys.readouterr().out
    assert "the choice is in" in shown
    assert "samples by student entropy" in shown
    before = (tmp_path / "run" / "samples.json").read_bytes()
    found = json.loads(before)
    assert (len(found["kept"]), len(found["scores"])) == (16, 64)

    def refuse(*args):
        raise AssertionError("scored again")

    monkeypatch.setattr("sekd.samples.score_samples", refuse)
    assert main(["train", recipe, *flags]) == 0
    assert (tmp_path / "run" / "samples.json").read_bytes() == before
    assert main(["samples", recipe, *flags]) == 0


def test_samples_loads_the_teacher_only_where_the_score_needs_it(recipe, tmp_path, capsys):
    flags = ["--sample_fraction", "0.25", "--teacher_model_name_or_path", str(tmp_path / "nowhere")]
    assert main(["samples", recipe, *flags]) == 0
    assert main(["samples", recipe, *flags, "--sample_score", "kl"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["samples", "train"])
def test_samples_of_a_stream_without_a_pool_stop_at_parse(recipe, capsys, command):
    flags = ["--sample_fraction", "0.25", "--dataset_streaming", "true", "--dataset_name", "no/such-dataset"]
    assert main([command, recipe, *flags]) == 2
    assert (
        "sample_fraction 0.25 of a stream is unknown, since it has no length; set sample_pool"
        in capsys.readouterr().err
    )


def test_samples_of_everything_are_no_choice(recipe, capsys):
    assert main(["samples", recipe]) == 2
    assert "sample_fraction is 1, which keeps every sample; set it" in capsys.readouterr().err


def test_a_score_mapping_on_the_command_line_and_in_yaml(recipe, tmp_path):
    _, args, _ = parse_recipe(recipe, ["--position_score", '{"student_entropy": 1.0, "kl": 0.5}'])
    assert args.position_score == {"student_entropy": 1.0, "kl": 0.5}
    with open(recipe, "a") as file:
        file.write("position_score: {student_entropy: 1.0, kl: 0.5}\nscore_normalization: zscore\n")
    _, args, _ = parse_recipe(recipe)
    assert args.scoring.weights == (1.0, 0.5)
    assert main(["train", recipe, "--max_steps", "2"]) == 0
    written = str(tmp_path / "run" / "recipe.yaml")
    assert parse_recipe(written)[1].position_score == {"student_entropy": 1.0, "kl": 0.5}
