"""The README's tree, keys, example and commands are true."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from sekd.config import ENGINES, SEKDConfig
from sekd.losses import DIVERGENCES
from sekd.policies import POLICIES
from sekd.recipe import parse_recipe
from sekd.scores import SCORES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def test_the_tree_is_the_tree():
    (tree,) = [text for language, text in BLOCKS if not language and text.startswith("sekd/")]
    named, folder = set(), ""
    for line in tree.splitlines():
        if not line.startswith(" "):
            folder, *rest = line.split(maxsplit=1)
            named |= {folder + word for text in rest for word in text.split() if "." in word}
            named.add(folder)
        else:
            named.add(folder + line.split()[0])
    for name in named:
        assert (ROOT / name).exists(), f"{name} stands in the README only"
    for folder, pattern in (("sekd", "*.py"), ("rollouts", "*.py"), ("scripts", "*.*")):
        there = {f"{folder}/{p.name}" for p in (ROOT / folder).glob(pattern) if p.name != "__init__.py"}
        assert there <= named, f"not in the README: {there - named}"


def test_the_table_names_every_choice():
    for name in [*POLICIES, *SCORES, *DIVERGENCES, *ENGINES]:
        assert f"`{name}`" in README, name


def test_the_python_example_uses_real_names():
    (example,) = [text for language, text in BLOCKS if language == "python"]
    assert len(example.strip().splitlines()) <= 11
    calls = {
        node.func.id: node
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Call) and hasattr(node.func, "id")
    }
    assert {k.arg for k in calls["SEKDConfig"].keywords} <= {f.name for f in fields(SEKDConfig)}
    from inspect import signature

    from sekd import SEKDTrainer

    assert {k.arg for k in calls["SEKDTrainer"].keywords} <= set(signature(SEKDTrainer).parameters)


def commands():
    for language, text in BLOCKS:
        if language == "bash":
            yield from re.sub(r"\\\n\s*", " ", text).splitlines()


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("sekd train recipes")])
def test_recipe_commands_parse(command):
    words = [word.strip("'") for word in command.split("#")[0].split()]
    parse_recipe(str(ROOT / words[2]), words[3:])


def test_scripts_named_exist():
    for script in re.findall(r"scripts/\w+\.\w+", README):
        assert (ROOT / script).exists()
