"""A recipe and the command line become objects."""

import os
import sys
from pathlib import Path

import pytest
import yaml

from sekd.callbacks import as_recipe
from sekd.cli import main
from sekd.recipe import Run, find_recipe, list_recipes, parse_recipe


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


def test_a_shipped_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo = list_recipes()["demo"]
    assert os.path.isfile(demo)
    for name in ("demo", "demo.yaml", "recipes/demo.yaml", demo):
        assert find_recipe(name) == demo
    assert parse_recipe("demo")[1].output_dir == "runs/demo/sekd"
    (tmp_path / "demo").mkdir()
    assert find_recipe("demo") == demo, "a folder is not a recipe"
    (tmp_path / "demo.yaml").write_text("max_steps: 1\n")
    assert find_recipe("demo.yaml") == "demo.yaml", "a file here comes first"


@pytest.mark.parametrize("name", ["nowhere", "mine/demo.yaml", "../recipes/nowhere.yaml", ""])
def test_an_unknown_recipe_lists_the_shipped_ones(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"recipe '{name}': no such file, .* \(demo, .*gsm8k_on_policy_sekd\)"):
        find_recipe(name)


def test_a_folder_is_not_a_recipe(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder; a recipe is a YAML file"):
        find_recipe(str(tmp_path))


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
    with pytest.raises(ValueError, match=r"has the results of an earlier run \(checkpoint-2\): resume it with"):
        Run.parse(recipe).check_folder()
    Run.parse(recipe, ["--resume_from_checkpoint", "true"]).check_folder()
    with pytest.raises(ValueError, match=r"checkpoint-2' has no checkpoint\.json"):
        Run.parse(recipe, ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")]).check_folder()
    with pytest.raises(ValueError, match="there is no checkpoint in output_dir"):
        Run.parse(recipe, ["--resume_from_checkpoint", "true", "--output_dir", str(tmp_path / "new")]).check_folder()
    with pytest.raises(ValueError, match="overwrite_output_dir would delete"):
        Run.parse(recipe, ["--overwrite_output_dir", "true", "--output_dir", str(tmp_path)]).check_folder()


@pytest.mark.parametrize("folder", ["beside the recipe", "here"])
def test_modules_are_imported_from_the_recipes_folder_and_from_here(recipe, tmp_path, monkeypatch, folder):
    name = f"my_scores_{folder.split()[0]}"
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    place = tmp_path if folder == "beside the recipe" else tmp_path / "elsewhere"
    (place / f"{name}.py").write_text("READ = True\n")
    parse_recipe(recipe, ["--import_modules", name])
    assert sys.modules.pop(name).READ
