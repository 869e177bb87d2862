"""A sweep file becomes runs: methods x grid x seeds. What is wrong is one line that says where."""

import re
from pathlib import Path

import pytest
import yaml

from sekd.cli import main
from sekd.notation import load_yaml
from sekd.sweep.engines import read_last_error, share_machine
from sekd.sweep.file import as_words, find_sweep, list_sweeps, read_sweep
from sekd.sweep.run_state import STATE, begin, check_runs, check_state, describe_state, finish, is_finished

GRID = {"learning_rate": [1e-3, 1e-2]}


@pytest.fixture
def sweep_file(recipe, tmp_path):
    """A function that writes a sweep file, with some keys changed, and returns its path."""

    def write(**changes):
        content = {
            "recipe": "recipe.yaml",
            "output_dir": str(tmp_path / "sweep"),
            "keys": {"max_steps": 2, "dataset_train_split": "train[8:]", "dataset_test_split": "train[:8]"},
            "methods": {"Full KD": {"position_policy": "all"}, "SE-KD": None},
            "seeds": [1, 2],
            **changes,
        }
        content["keys"] |= {"eval_strategy": "steps", "eval_steps": 2}
        path = tmp_path / "my_sweep.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
        return str(path)

    return write


def test_runs_are_seeds_by_methods_by_points(sweep_file):
    methods = {"Full KD": {"position_policy": "all"}, "SE-KD": {"grid": {"position_fraction": [0.1, 0.2, 0.5]}}}
    sweep = read_sweep(sweep_file(grid=GRID, methods=methods, seeds=[7, 3]), ["--max_steps", "5", "--logging_steps=1"])
    assert [(run.method, run.seed, run.place) for run in sweep.runs[:5]] == [
        ("Full KD", 7, "learning_rate 0.001"),
        ("Full KD", 7, "learning_rate 0.01"),
        ("SE-KD", 7, "position_fraction 0.1"),
        ("SE-KD", 7, "position_fraction 0.2"),
        ("SE-KD", 7, "position_fraction 0.5"),
    ]
    assert [run.seed for run in sweep.runs] == [7] * 5 + [3] * 5
    first = sweep.runs[1].keys
    assert (first["position_policy"], first["learning_rate"], first["seed"]) == ("all", 0.01, 7)
    assert (first["max_steps"], first["logging_steps"]) == ("5", "1"), "the command line beats keys"
    assert first["max_completion_length"] == 4, "the recipe has it"
    assert len({run.folder for run in sweep.runs}) == 10
    assert sweep.baseline == "Full KD"


def test_steps_and_tokens_replace_each_other(sweep_file):
    methods = {"Tokens": {"max_tokens": 9}, "Steps": {}}
    tokens, steps, *_ = read_sweep(sweep_file(recipe="fineweb_edu_sekd", methods=methods)).runs
    assert tokens.keys["max_tokens"] == 9
    assert "max_steps" not in tokens.keys
    assert steps.keys["max_steps"] == 2
    assert "max_tokens" not in steps.keys
    with pytest.raises(ValueError, match="--max_steps has no effect, since method 'Tokens'"):
        read_sweep(sweep_file(recipe="fineweb_edu_sekd", methods=methods), ["--max_steps", "5"])


def test_a_method_may_have_another_recipe(sweep_file):
    methods = {"Full KD": {}, "3X": {"recipe": "gsm8k_off_policy_sekd_3x"}}
    sweep = read_sweep(sweep_file(methods=methods))
    assert sweep.runs[1].keys["class_selection"] == "rs_kd"
    assert "class_selection" not in sweep.runs[0].keys


def test_all_runs_are_parsed_before_the_first_one(sweep_file, capsys):
    path = sweep_file(methods={"Full KD": {"position_policy": "all"}, "Wrong": {"position_polcy": "all"}})
    assert main(["sweep", path]) == 2
    error = capsys.readouterr().err
    assert "Wrong, seed 1: unknown key 'position_polcy' in the recipe; the nearest key is 'position_policy'" in error


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"methds": {}}, [], "unknown key 'methds' in the sweep; the nearest key is 'methods'"),
        ({"seeds": [1, 1]}, [], "seeds [1, 1] must be a list of different whole numbers"),
        ({"seeds": None}, [], "seeds None must be"),
        ({"grid_seeds": [1]}, [], "grid_seeds has no effect without a grid"),
        (
            {"methods": {"A": {"seeds": [1]}, "B": {"seeds": [2]}}},
            [],
            "seeds of method 'B': the baseline 'A' has none of them",
        ),
        ({"grid_seeds": [3]}, [], "grid_seeds has 3, which is not among the seeds of the sweep, [1, 2]"),
        ({"grid_seeds": []}, [], "grid_seeds [] must be a list of different whole numbers"),
        (
            {"grid": GRID, "grid_seeds": [1], "methods": {"A": {"seeds": [2]}}},
            [],
            "seeds of method 'A': none of them is in grid_seeds [1]: add one",
        ),
        ({"methods": {"A": {"seeds": [1, 5]}}}, [], "seeds of method 'A' has 5, which is not among"),
        ({"baseline": "KD"}, [], "baseline 'KD' is no method; choose one of Full KD, SE-KD"),
        ({"grid": {"learning_rate": 1e-3}}, [], "learning_rate 0.001 must be a list of values"),
        ({"grid": {"position_policy": ["all"]}}, [], "method 'Full KD' sets position_policy, and the grid varies it"),
        ({"methods": {"A": {"seed": 3}}}, [], "seed of method 'A': the sweep sets it; set seeds of the sweep"),
        ({"methods": {"A b": {}, "A?b": {}}}, [], "have the same folder"),
        ({}, ["--position_policy", "all"], "--position_policy has no effect, since method 'Full KD' or its grid sets"),
        ({"references": {"T": "x"}}, [], "references are evaluated: add test or validation"),
        ({"test": {"limit": 3}}, [], "test names nothing to evaluate"),
        ({"test": {"suite": "paper", "output": "x"}}, [], "test: the sweep sets output itself"),
        ({"recipe": "nowhere"}, [], "recipe 'nowhere': no such file"),
    ],
)
def test_what_is_wrong_is_named(sweep_file, changes, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_sweep(sweep_file(**changes), flags)


def test_a_grid_needs_a_score_and_a_table_too(sweep_file):
    with pytest.raises(ValueError, match="nothing chooses the best point of the grid"):
        check_runs(read_sweep(sweep_file(grid=GRID)))
    check_runs(read_sweep(sweep_file(grid=GRID), ["--metric_for_best_model", "forward_kl"]))
    with pytest.raises(ValueError, match="nothing is evaluated, so the table would be empty"):
        check_runs(read_sweep(sweep_file(), ["--eval_strategy", "no"]))


@pytest.mark.slow
def test_the_options_of_an_evaluation_are_checked(sweep_file, capsys):
    pytest.importorskip("lm_eval")
    for options, message in (
        ({"suite": "papr"}, "test: unknown suite or task 'papr'"),
        ({"suite": "paper", "limt": 3}, "test: unrecognized arguments: --limt 3"),
        ({"suite": "distillation", "text": "x"}, "test: the suite distillation needs --teacher"),
    ):
        assert main(["sweep", sweep_file(test=options), "--dry-run"]) == 2
        assert message in capsys.readouterr().err
    both = {"tasks": ["arc_easy", "piqa"]}
    assert main(["sweep", sweep_file(test=both, validation=both, grid=GRID), "--dry-run"]) == 2
    assert "one suite, or one task, chooses" in capsys.readouterr().err
    words = as_words({"suite": "paper", "data_dir": ["a", "b"], "chat_template": True, "seed": None, "limit": 3})
    assert words == ["--suite", "paper", "--data-dir", "a", "b", "--chat-template", "--limit", "3"]


def test_a_folder_with_other_keys_is_refused(sweep_file, tmp_path):
    run = read_sweep(sweep_file()).runs[0]
    assert describe_state(run) == "run"
    arguments = begin(run)
    assert arguments[-2:] == ["--overwrite_output_dir", "true"]
    assert load_yaml(Path(arguments[1]).read_text()) == run.keys
    check_state(run)
    assert not is_finished(run)
    finish(run.folder, 5)
    assert not is_finished(run), "there is no student"
    (tmp_path / "sweep" / "Full_KD-seed_1" / "config.json").write_text("{}")
    assert is_finished(run)
    changed = read_sweep(sweep_file(), ["--learning_rate", "0.5"]).runs[0]
    with pytest.raises(ValueError, match=r'other keys: learning_rate "0.5" \(it has 0.001\)'):
        check_state(changed)
    (tmp_path / "sweep" / "Full_KD-seed_1" / STATE).unlink()
    with pytest.raises(ValueError, match="no run of this version"):
        check_state(run)


def test_the_threads_and_gpus_are_shared_out(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    gpus = [share_machine(place, 2, ["0", "1", "2", "3"]) for place in range(2)]
    assert gpus == [{"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": value} for value in ("0,1", "2,3")]
    assert [share_machine(i, 3, ["5"])["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["5"] * 3
    assert share_machine(0, 16, []) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert share_machine(0, 16, []) == {"OMP_NUM_THREADS": "3"}


def test_the_last_error_of_a_log(tmp_path):
    log = tmp_path / "log"
    assert read_last_error(str(log)) == "it wrote nothing"
    log.write_text("$ sekd train a\nsekd: old\n$ sekd train a\n  1%|\r 2%|\nsekd: the reason\nlast words\n")
    assert read_last_error(str(log)) == "sekd: the reason"
    log.write_text("$ sekd train a\nTraceback\nValueError: the reason\n  5%|\n")
    assert read_last_error(str(log)) == "ValueError: the reason"


def test_every_shipped_sweep_parses_and_names_its_command(capsys, own_strategies):
    assert main(["sweep"]) == 0
    listed = capsys.readouterr().out
    for name, path in list_sweeps().items():
        assert f"{name} " in listed
        assert f"sekd sweep {name}" in Path(path).read_text()
        assert find_sweep(f"recipes/sweeps/{name}.yaml") in (path, f"recipes/sweeps/{name}.yaml")
        check_runs(read_sweep(name))
    with pytest.raises(ValueError, match="sweep 'nowhere': no such file, and no sweep that sekd ships"):
        find_sweep("nowhere")
