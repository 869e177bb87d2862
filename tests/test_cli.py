"""The `sekd` command: help, mistakes and what it imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from sekd.cli import COMMANDS, main
from sekd.cli.cache import ACTIONS
from sekd.parse import CACHE, ROLLOUTS


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_stepz", "3"], "unknown key 'max_stepz' in the command line; the nearest key is 'max_steps'"),
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


@pytest.mark.parametrize("command", [*COMMANDS, *(f"cache {action}" for action in ACTIONS)])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert f"  sekd {command}" in capsys.readouterr().out.replace("RAY_ADDRESS=auto ", "")


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert f"    {name} " in shown
        assert summary in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian", "demo"], "invalid choice: 'trian'"),
        (["demo", "--sede", "1"], "unrecognized arguments: --sede 1"),
        (["demo", "--se", "1"], "unrecognized arguments: --se 1"),
        (["cache", "biuld"], "invalid choice: 'biuld'"),
        (["train"], "the following arguments are required: RECIPE"),
        (["cache", "info", "--plan", "--drawn", "3"], "unrecognized arguments: --drawn"),
    ],
)
def test_a_wrong_command_line_is_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_overrides_reach_the_recipe_in_their_order(recipe, monkeypatch):
    """Whatever argparse makes of values that look like options; --help is help wherever it stands."""
    parsed = []
    monkeypatch.setattr("sekd.recipe.parse_recipe", lambda *args: parsed.append(args) or (_ for _ in ()).throw(OSError))
    overrides = ["--max_steps", "-1", "--stop_strings", "a", "b", "--learning_rate=1e-3", "--top_k", "5"]
    assert main(["train", recipe, *overrides]) == 2
    assert main(["cache", "build", recipe, "--seed", "1", "--output", "out", *overrides]) == 2
    built = ["--seed", "1", *overrides, "--teacher_cache", "out"]
    assert main(["rollouts", recipe, "--seed", "1", "--output", "out.jsonl", *overrides]) == 2
    sampled = ["--seed", "1", *overrides]
    assert parsed == [(recipe, overrides, None), (recipe, built, CACHE), (recipe, sampled, ROLLOUTS)]
    with pytest.raises(SystemExit) as stop:
        main(["train", recipe, "--max_steps", "3", "--help"])
    assert stop.value.code == 0


WITHOUT_TORCH = """
import contextlib, io, sys
from sekd.cli import COMMANDS, main
from sekd.parse import CACHE, ROLLOUTS
from sekd.cli.cache import ACTIONS
shown = io.StringIO()
with contextlib.redirect_stdout(shown):
    for command in ([], *([name] for name in COMMANDS), *(["cache", action] for action in ACTIONS)):
        with contextlib.suppress(SystemExit):
            main([*command, "--help"])
    main(["recipes"])
assert "MISSING" not in shown.getvalue()
for command in (["train"], ["samples"], ["rollouts"], ["cache", "build"]):
    assert main([*command, "nope.yaml"]) == 2
    assert main([*command, "demo", "max_steps", "3"]) == 2
for text in ("a: [", "- a", "5: 3", "null: 3", "env: {LD_PRELOAD: x.so}"):
    with open(sys.argv[1], "w") as file:
        file.write(text)
    assert main(["train", sys.argv[1]]) == 2, text
heavy = {"torch", "transformers", "trl", "datasets", "accelerate", "vllm", "sekd.config"} & {*sys.modules}
sys.exit(str(heavy) if heavy else 0)
"""


def test_help_and_what_is_wrong_at_first_sight_need_no_torch(tmp_path):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_peft_trl_and_bitsandbytes_are_imported_when_they_are_used():
    """Not by a module's import. (transformers' own trainer imports PEFT, and that bitsandbytes.)"""
    root = Path(__file__).parents[1]
    for path in [*(root / "sekd").rglob("*.py"), *(root / "rollouts").glob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & {"peft", "trl", "bitsandbytes"}, path


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "sekd.cli", "--help"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: sekd ")
    assert not done.stderr, "a module that is there twice is warned of"


@pytest.mark.slow
def test_the_trainer_does_not_import_what_it_does_not_use():
    code = (
        "import sys, sekd.trainer; "
        "bad = [m for m in sys.modules if m == 'vllm' or m.startswith('trl.trainer.') and m.endswith('_trainer')]; "
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
