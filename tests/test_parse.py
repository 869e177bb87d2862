"""A recipe and the command line become records; whatever they hold, what is wrong is one line."""

import os
import re
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl import ModelConfig, ScriptArguments

from sekd import SEKDConfig
from sekd.callbacks import as_recipe
from sekd.parse import find_recipe, list_recipes, parse_recipe
from sekd.recipe import Run
from sekd.validation.values import read_field


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
    with pytest.raises(ValueError, match=r"position_fraction 'twenty' must be a finite number"):
        parse_recipe(recipe, ["--position_fraction", "twenty"])
    with pytest.raises(ValueError, match=r"position_fraction 2.0 is outside \(0, 1\]"):
        parse_recipe(recipe, ["--position_fraction", "2"])


def test_a_recipe_as_run_reads_the_same(recipe, tmp_path):
    records = parse_recipe(recipe, ["--lmbda", "0.5", "--max_steps", "9"])
    (tmp_path / "again.yaml").write_text(as_recipe(*records))
    assert "position_fraction: 0.2" in (tmp_path / "again.yaml").read_text(), "defaults are spelled out"
    for ours, theirs in zip(parse_recipe(str(tmp_path / "again.yaml")), records, strict=True):
        assert as_recipe(ours) == as_recipe(theirs)


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


# Recipes that are mutated at random

FIELDS = {f.name: record for record in (ScriptArguments, SEKDConfig, ModelConfig) for f in fields(record) if f.init}
BASES = [yaml.safe_load(Path(path).read_text()) for path in list_recipes().values()]


def fits(name, value):
    """Whether a value is of the kind of the field."""
    try:
        read_field(FIELDS[name], name, value)
    except ValueError:
        return False
    return True


WORDS = ["", "no", "true", "1e2", "-1", "nan", "null", "auto", "{", "{a: 1}", "[a, b]", "./x", "a/b", "all", "none"]
PLAIN = [0, 1, 2, -1, 0.5, True, False, None, "no", "steps", "epoch", "best", "kl", "float32", "x", [], ["x"], {"a": 1}]
KEYS = [*FIELDS, "env", "no_packing", "config", "max-steps", "predict_with_generate"]
numbers = st.integers() | st.integers(-2, 3) | st.floats() | st.sampled_from([10**30, -(10**400), 1e300])
leaves = st.none() | st.booleans() | numbers | st.text(max_size=8) | st.sampled_from(WORDS)
keys = st.text(max_size=8) | st.none() | st.booleans() | st.integers()
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=3), max_leaves=5)
fitting = st.sampled_from([(name, value) for name in FIELDS for value in PLAIN if fits(name, value)])
plain = st.lists(fitting, min_size=1, max_size=3).map(dict)
wild = st.dictionaries(st.sampled_from(KEYS) | keys, values, min_size=1, max_size=3)
words = st.sampled_from([f"--{key}" for key in KEYS]) | st.sampled_from(WORDS) | st.text(max_size=8)
INTERNALS = r"Traceback|NoneType|has no attribute|argument of type|keyword argument|<class|__|Error\b|0x"
EXAMPLES = int(os.environ.get("SEKD_MUTATED_RECIPES", "300"))
"""SEKD_MUTATED_RECIPES=10000 pytest -n 0 -s -k mutated tests/test_parse.py"""


@pytest.fixture
def outcomes(tmp_path, monkeypatch):
    """Counts of what became of the recipes. The environment is as before afterwards, and nothing is written here."""
    for model in ("student", "teacher"):  # those of the recipe demo
        (tmp_path / "runs" / "demo" / model).mkdir(parents=True)
        (tmp_path / "runs" / "demo" / model / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    counts = Counter()
    yield counts
    print(dict(counts))


@settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES <= 300,
    deadline=None,
    database=None,
    suppress_health_check=[*HealthCheck],
)
@given(st.sampled_from(BASES), st.sets(st.sampled_from([*FIELDS]), max_size=3), plain | wild, st.data())
def test_mutated_recipes_are_parsed_or_refused_in_one_line(outcomes, base, dropped, changes, data):
    recipe = {key: value for key, value in base.items() if key not in dropped} | changes
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    flags = data.draw(st.lists(words, max_size=3)) if data.draw(st.integers(0, 3)) == 0 else []
    if data.draw(st.integers(0, 5)) == 0:  # the file is damaged too
        place = data.draw(st.integers(0, len(text)))
        text = text[:place] + data.draw(st.text(max_size=3)) + text[place + data.draw(st.integers(0, 3)) :]
    Path("mutated.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        Run.parse("mutated.yaml", flags)
    except ValueError as error:
        outcomes["refused"] += 1
        message = re.sub(r"'[^']*'", "...", str(error))  # what is in quotes is the recipe's
        assert message
        assert len(message.splitlines()) == 1, message
        assert not re.search(INTERNALS, message), message
    else:
        outcomes["parsed"] += 1
