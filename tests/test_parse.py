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
from transformers.utils import logging
from trl import ModelConfig, ScriptArguments

from sekd import SEKDConfig
from sekd.callbacks import as_recipe
from sekd.parse import CACHE, find_recipe, list_recipes, parse_recipe, read_recipe
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


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nowhere", "`sekd recipes` lists them"),
        ("", "`sekd recipes` lists them"),
        ("mine/demo.yaml", "the nearest is 'demo'"),
        ("../recipes/gsm8k_on_polcy_sekd.yaml", "the nearest is 'gsm8k_on_policy_sekd'"),
    ],
)
def test_an_unknown_recipe_names_the_nearest_one(name, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"recipe '{name}': no such file, and no recipe that sekd ships; {hint}"):
        find_recipe(name)


def test_a_recipe_has_the_keys_of_its_base_and_its_own(recipe, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text("base: ../recipe.yaml\nmax_steps: 9\nuse_peft: true\n")
    monkeypatch.chdir(tmp_path / "mine")
    for path in ("recipe.yaml", "../mine/recipe.yaml", str(tmp_path / "mine" / "recipe.yaml")):
        _, args, model = parse_recipe(path, ["--logging_steps", "3"])
        assert (args.max_steps, args.save_steps, args.logging_steps, model.use_peft) == (9, 2, 3, True)
        assert as_recipe(args) == as_recipe(parse_recipe(recipe, ["--max_steps", "9", "--logging_steps", "3"])[1])
    monkeypatch.chdir(tmp_path)
    assert parse_recipe("mine/recipe.yaml")[1].max_steps == 9, "relative to the recipe, not to here"


def test_a_null_beats_the_base_too(recipe, tmp_path):
    """It is a value as any other: what no value means for its field."""
    (tmp_path / "base.yaml").write_text(f"{Path(recipe).read_text()}system_prompt: Be brief.\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nsystem_prompt: null\n")
    assert parse_recipe(str(tmp_path / "base.yaml"))[1].system_prompt == "Be brief."
    assert parse_recipe(str(tmp_path / "mine.yaml"))[1].system_prompt is None
    (tmp_path / "mine.yaml").write_text("base: base.yaml\npacking: null\n")
    with pytest.raises(ValueError, match="packing null must be true or false"):
        parse_recipe(str(tmp_path / "mine.yaml"))


def test_steps_and_tokens_replace_each_other(tmp_path):
    def read(path, *flags):
        _, args, _ = parse_recipe(str(path), flags)
        return args.max_tokens, args.max_steps

    assert read("fineweb_edu_sekd") == (80_000_000, 9766)
    assert read("fineweb_edu_sekd", "--max_steps", "7") == (None, 7)
    assert read("fineweb_edu_sekd", "--max_tokens", "20000") == (20_000, 3)
    (tmp_path / "mine.yaml").write_text("base: fineweb_edu_sekd\nmax_steps: 5\n")
    assert read(tmp_path / "mine.yaml") == (None, 5)
    (tmp_path / "run.yaml").write_text(as_recipe(*parse_recipe("fineweb_edu_sekd")))  # it has both
    assert read(tmp_path / "run.yaml") == (80_000_000, 9766)
    assert read(tmp_path / "run.yaml", "--max_tokens", "20000") == (20_000, 3)
    (tmp_path / "mine.yaml").write_text("base: fineweb_edu_sekd\nmax_steps: 5\nmax_tokens: 20000\n")
    with pytest.raises(ValueError, match="max_steps 5 and max_tokens 20000, which means 3 steps of 16 x 512 tokens"):
        parse_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("base", ["demo", "demo.yaml", "recipes/demo.yaml"])
def test_a_shipped_recipe_is_a_base(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"base: {base}\nseed: 7\n")
    assert read_recipe("mine.yaml") == read_recipe(find_recipe("demo")) | {"seed": 7}


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere.yaml", "base: recipe 'nowhere.yaml': no such file, and no recipe that sekd ships; "),
        ("..", "base: recipe '..' is a folder"),
        ("mine.yaml", "its base 'mine.yaml' has a base itself, 'mine.yaml'; a base must be whole, so copy"),
        ("other.yaml", "its base 'other.yaml' has a base itself, 'recipe.yaml'; a base must be whole"),
        ("gsm8k_off_policy_sekd", "has a base itself, 'gsm8k_off_policy_full_kd.yaml'"),
        ("list.yaml", "list.yaml' is not a mapping of keys to values"),
        ("typo.yaml", "unknown key 'max_step' in the recipe's base '.*typo.yaml'; the nearest key is 'max_steps'"),
        ("null", "base None must be the path of a recipe, or the name of a shipped one"),
        ("''", "base '' must be the path of a recipe"),
        ("3", "base 3 must be the path of a recipe"),
        ("[recipe.yaml]", r"base \['recipe.yaml'\] must be the path of a recipe"),
    ],
)
def test_an_invalid_base_is_one_line(recipe, tmp_path, base, message):
    (tmp_path / "other.yaml").write_text("base: recipe.yaml\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "typo.yaml").write_text("max_step: 3\n")
    (tmp_path / "mine.yaml").write_text(f"base: {base}\n")
    with pytest.raises(ValueError, match=message) as refused:
        parse_recipe(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(refused.value)


def test_the_command_line_has_no_base(recipe):
    with pytest.raises(ValueError, match="unknown key 'base' in the command line"):
        parse_recipe(recipe, ["--base", "demo"])


def test_a_folder_is_not_a_recipe(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder; a recipe is a YAML file"):
        find_recipe(str(tmp_path))


@pytest.mark.parametrize("folder", ["beside", "here", "base"])
def test_modules_are_imported_from_the_recipes_folder_its_bases_and_from_here(recipe, tmp_path, monkeypatch, folder):
    name = f"my_scores_{folder}"
    monkeypatch.setattr(sys, "path", [*sys.path])
    for place in ("beside", "here"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "beside" / "mine.yaml").write_text("base: ../recipe.yaml\n")
    place = tmp_path if folder == "base" else tmp_path / folder
    (place / f"{name}.py").write_text("READ = True\n")
    parse_recipe(str(tmp_path / "beside" / "mine.yaml"), ["--import_modules", name])
    assert sys.modules.pop(name).READ


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5: 3", "the key 5 is not a name"),
        ("null: 3", "the key null is not a name"),
        ("prompt_template: 0", r"prompt_template 0 must be text \(a number needs quotes\)"),
        ("model_name_or_path: 5", "model_name_or_path 5 must be text"),
        ("output_dir: 5", "output_dir 5 must be text"),
        ("dataset_name: [a, b]", r"dataset_name \['a', 'b'\] must be text"),
        ("system_prompt: 0", "system_prompt 0 must be text"),
        ("chat_template_kwargs: 3", r"chat_template_kwargs 3 must be a mapping such as \{key: value\}"),
        ("chat_template_kwargs: x", "chat_template_kwargs 'x' must be a mapping"),
        ("chat_template_kwargs: {1: 2}", r"chat_template_kwargs \{1: 2\} must be a mapping"),
        ("seed: null", "seed null must be a whole number"),
        ("seed: 1.5", "seed 1.5 must be a whole number"),
        ("seed: true", "seed True must be a whole number"),
        ("stop_strings: [1]", r"stop_strings \[1\] must be a list of texts that are not empty"),
        ("import_modules: ['']", r"import_modules \[''\] must be a list of texts"),
        ("use_peft: 2", "use_peft 2 must be true or false"),
        ("eval_strategy: never", "eval_strategy 'never' must be one of no, steps, epoch"),
        ("dtype: int8", "dtype 'int8' must be one of auto, bfloat16"),
        ("parallelism_config: 3", "parallelism_config 3 must be a ParallelismConfig, which only Python can give"),
        ("lr_scheduler_kwargs: '{'", r"lr_scheduler_kwargs '\{' is not a mapping; write for example '\{key: value\}'"),
        ("env: {LD_PRELOAD: x.so}", "a recipe cannot set env: set environment variables in the shell"),
        ("predict_with_generate: true", "unknown key 'predict_with_generate' in the recipe; `sekd train --help` lists"),
        ("a: [", "is not YAML: expected the node content, but found .<stream end>. in line"),
    ],
)
def test_what_is_wrong_is_one_line(recipe, line, message):
    with open(recipe, "a") as file:
        file.write(f"{line}\n")
    before = dict(os.environ)
    with pytest.raises(ValueError, match=message) as refused:
        parse_recipe(recipe)
    assert "\n" not in str(refused.value)
    assert os.environ == before


def test_text_becomes_what_it_spells(recipe):
    flags = ["--max_steps", "1e2", "--learning-rate=-0", "--use_peft", "--no_packing", "--stop_strings", "a", "-b"]
    flags += ["--chat_template_kwargs", "{thinking: false}", "--lr_scheduler_kwargs", '{"min_lr": 1e-6}']
    flags += ["--resume_from_checkpoint", "false", "--include_num_input_tokens_seen", "all"]
    _, args, model = parse_recipe(recipe, flags)
    assert (args.max_steps, args.learning_rate, model.use_peft, args.packing) == (100, 0, True, False)
    assert args.stop_strings == ["a", "-b"]
    assert (args.chat_template_kwargs, args.lr_scheduler_kwargs) == ({"thinking": False}, {"min_lr": 1e-6})
    assert (args.resume_from_checkpoint, args.include_num_input_tokens_seen) == (False, "all")
    with open(recipe, "a") as file:
        file.write("save_strategy: no\nresume_from_checkpoint: true\nsystem_prompt: 2024-01-01\nbf16: 'no'\n")
        file.write("lr_scheduler_kwargs: {min_lr: 1e-6}\nstop_strings: one\n")
    _, args, _ = parse_recipe(recipe)
    assert (args.save_strategy, args.resume_from_checkpoint, args.system_prompt) == ("no", True, "2024-01-01")
    assert (args.bf16, args.lr_scheduler_kwargs, args.stop_strings) == (False, {"min_lr": 1e-6}, ["one"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["max_steps", "3"], "'max_steps' on the command line belongs to no key; write --key value"),
        (
            ["--seed", "1", "max_steps", "3"],
            "--seed takes one value, but got '1 max_steps 3'; write every key as --",
        ),
        (["--stop_strings"], "stop_strings True must be a list of texts"),
        (["--no_seed"], "seed 'false' must be a whole number"),
        (["--seed", ""], "seed '' must be a whole number"),
    ],
)
def test_words_that_belong_to_no_key(recipe, flags, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(recipe, flags)


def test_a_cache_has_a_divergence_of_its_own(recipe, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging.get_logger("sekd.parse"), "warning", warnings.append)
    flags = ["--lmbda", "1", "--divergence", "reverse_kl", "--teacher_cache", "c"]
    with pytest.raises(ValueError, match=r"lmbda 1.0 with teacher_cache|estimates forward KL only"):
        parse_recipe(recipe, flags)
    _, args, _ = parse_recipe(recipe, flags, CACHE)
    assert (args.lmbda, args.divergence, args.class_selection) == (0, "forward_kl", "rs_kd")
    (line,) = warnings
    assert line.endswith("for it the recipe's lmbda 1.0, divergence reverse_kl have no effect")
    parse_recipe(recipe, ["--teacher_cache", "c"], CACHE)
    assert len(warnings) == 1


# Recipes that are mutated at random

FIELDS = {f.name: record for record in (ScriptArguments, SEKDConfig, ModelConfig) for f in fields(record) if f.init}
BASES = [read_recipe(path) for path in list_recipes().values()]


def fits(name, value):
    """Whether a value is of the kind of the field."""
    try:
        read_field(FIELDS[name], name, value)
    except ValueError:
        return False
    return True


WORDS = ["", "no", "true", "1e2", "-1", "nan", "null", "auto", "{", "{a: 1}", "[a, b]", "./x", "a/b", "all", "none"]
PLAIN = [0, 1, 2, -1, 0.5, True, False, None, "no", "steps", "epoch", "best", "kl", "float32", "x", [], ["x"], {"a": 1}]
KEYS = [*FIELDS, "base", "env", "no_packing", "config", "max-steps", "predict_with_generate"]
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
    before = dict(os.environ)  # modules that are imported meanwhile keep os.environ itself
    counts = Counter()
    yield counts
    os.environ.clear()
    os.environ.update(before)
    print(dict(counts))


@pytest.mark.slow
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
