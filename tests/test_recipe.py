"""A recipe and the command line become objects."""

from pathlib import Path

import pytest
import yaml

from sekd.cli import main
from sekd.parse import parse_recipe
from sekd.recipe import Run
from sekd.run_folder import begin_run


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


def test_a_run_has_rows_and_held_out_rows(recipe):
    run = Run.parse(recipe)
    assert len(run.rows()) == 64
    assert run.held_out_rows() is None
    flags = ["--eval_strategy", "epoch", "--dataset_train_split", "train[8:]", "--dataset_test_split", "train[:8]"]
    run = Run.parse(recipe, flags)
    assert (len(run.rows()), len(run.held_out_rows())) == (56, 8)
    flags = ["--eval_on_start", "true", "--dataset_test_split", "train[:8]"]
    message = r"dataset_test_split 'train\[:8\]' of .*pairs.jsonl' has rows that dataset_train_split 'train' trains on"
    with pytest.raises(ValueError, match=message):
        Run.parse(recipe, flags).held_out_rows()


def test_a_run_needs_a_student_and_data(recipe, tmp_path):
    keys = yaml.safe_load(Path(recipe).read_text())
    for key, message in (("model_name_or_path", "there is no student"), ("dataset_name", "there is no training data")):
        path = tmp_path / "without.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in keys.items() if name != key}))
        with pytest.raises(ValueError, match=message):
            Run.parse(str(path))


def test_what_resume_from_checkpoint_may_be(recipe):
    assert Run.parse(recipe).resume is None
    for text, value in (("true", True), ("True", True), ("false", None), ("runs/x", "runs/x")):
        assert Run.parse(recipe, ["--resume_from_checkpoint", text]).resume == value


def test_the_folder_is_checked_before_models_load(recipe, tmp_path):
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    begin_run(str(tmp_path / "run"))
    (tmp_path / "run" / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match=r"has the results of an earlier run \(checkpoint-2\): resume it with"):
        Run.parse(recipe).check_output_dir()
    Run.parse(recipe, ["--resume_from_checkpoint", "true"]).check_output_dir()
    with pytest.raises(ValueError, match=r"checkpoint-2' has no checkpoint\.json"):
        Run.parse(recipe, ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")]).check_output_dir()
    with pytest.raises(ValueError, match="there is no checkpoint in output_dir"):
        Run.parse(
            recipe, ["--resume_from_checkpoint", "true", "--output_dir", str(tmp_path / "new")]
        ).check_output_dir()
    student = ["--model_name_or_path", str(tmp_path / "run")]
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="overwrite_output_dir would delete"):
        Run.parse(recipe, ["--overwrite_output_dir", "true", *student]).check_output_dir()
