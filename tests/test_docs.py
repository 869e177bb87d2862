"""README and docs are true: keys, commands, names, links, tables and the tree with its import order."""

import ast
import re
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import yaml
from trl import ModelConfig, ScriptArguments

from rollouts import ENGINES
from sekd import SEKDConfig, SEKDTrainer
from sekd.losses import DIVERGENCES
from sekd.parse import list_recipes, parse_recipe
from sekd.policies import POLICIES
from sekd.scores import SCORES
from sekd.sweep.file import KEYS as SWEEP_KEYS
from sekd.timing import PARTS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KEYS = {f.name for record in (ScriptArguments, SEKDConfig, ModelConfig) for f in fields(record)}


def blocks(page, language):
    text = page.read_text()
    return [
        code for name, code in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.M) if name == language
    ]


# The tree and its import order


def read_tree():
    """The files of the tree in docs/design.md, in order."""
    (tree,) = [code for code in blocks(ROOT / "docs" / "design.md", "") if code.startswith("sekd/")]
    files, folders = [], []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            files.append("".join(folders) + name)
    return files


def name_module(path):
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path):
    """The sekd modules that a file imports, also inside functions, but not for type checkers alone."""
    waiting, modules = [ast.parse((ROOT / path).read_text())], set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return {name for name in modules if name.split(".")[0] == "sekd"}


def test_the_tree_is_the_tree():
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "sekd").rglob("*.py")} - {"sekd/__init__.py"}
    assert set(read_tree()) == there


def test_a_module_imports_only_from_above_it():
    """Read from the imports themselves, and held to the order of docs/design.md."""
    order = {name_module(path): place for place, path in enumerate(read_tree())}
    upwards = []
    for path in read_tree():
        for name in imports(path):
            # The module itself, or the module that a name is taken from.
            module = next((m for m in (name, name.rpartition(".")[0]) if m in order), None)
            if module is None:
                assert name in ("sekd.SEKDConfig", "sekd.SEKDTrainer"), f"{path} imports {name}"
            elif order[module] >= order[name_module(path)]:
                upwards.append(f"{path} imports {module}")
    assert not upwards, "\n".join(upwards)


def test_rollouts_import_nothing_from_sekd():
    for path in (ROOT / "rollouts").glob("*.py"):
        assert not imports(path.relative_to(ROOT)), path


def test_no_file_is_two_things():
    for path in [*(ROOT / "sekd").rglob("*.py"), *(ROOT / "rollouts").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


# The README


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 140


def test_the_readme_names_every_choice():
    for name in [*POLICIES, *SCORES, *DIVERGENCES, *ENGINES]:
        assert f"`{name}`" in README, name


def test_recipes_are_in_their_page():
    page = (ROOT / "docs" / "recipes.md").read_text()
    for path in [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes" / "sweeps").glob("*.yaml")]:
        assert f"](../{path.relative_to(ROOT)})" in page, path.name
    for name in re.findall(r"`((?:gsm8k|fineweb_edu)_\w+[^_\W])`", README):
        assert name in list_recipes(), name


def test_the_python_example_uses_real_names():
    (example,) = blocks(ROOT / "README.md", "python")
    assert len(example.strip().splitlines()) <= 11
    calls = {
        node.func.id: node
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Call) and hasattr(node.func, "id")
    }
    assert {k.arg for k in calls["SEKDConfig"].keywords} <= KEYS
    assert {k.arg for k in calls["SEKDTrainer"].keywords} <= set(signature(SEKDTrainer).parameters)


# All pages


def commands():
    """Every command in a bash block, on one line and without comments."""
    for page in PAGES:
        for code in blocks(page, "bash"):
            for line in re.sub(r"\\\n\s*", " ", code).splitlines():
                yield line.split(" #")[0].strip()


COMMANDS = re.compile(r"sekd (train|samples|cache build) (\w+|recipes/\w+\.yaml)( .*)?$")


@pytest.mark.parametrize("command", sorted({c for c in commands() if COMMANDS.match(c) and "RECIPE" not in c}))
def test_recipe_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, recipe, rest = COMMANDS.match(command).groups()
    words = [word.strip("'") for word in (rest or "").replace("--output ", "--teacher_cache ").split()]
    parse_recipe(recipe, words)


def test_scripts_that_pages_name_exist():
    for page in PAGES:
        for script in re.findall(r"scripts/\w+\.\w+", page.read_text()):
            assert (ROOT / script).exists(), f"{page.name}: {script}"


def test_keys_in_yaml_blocks_are_real():
    for page in PAGES:
        for code in blocks(page, "yaml"):
            keys = yaml.safe_load(code).keys()
            assert keys <= KEYS | {"base"} or keys <= {*SWEEP_KEYS}, f"{page.name}:\n{code}"


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    for page in [*PAGES, *(ROOT / ".github").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text()):
            link = target[0] or target[1]
            if link.startswith("http"):
                continue
            path, _, anchor = link.partition("#")
            other = (page.parent / path).resolve() if path else page
            assert other.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(other), f"{page.name}: {link}"


def test_runs_explains_every_logged_number():
    page = (ROOT / "docs" / "runs.md").read_text()
    code = "".join((ROOT / "sekd" / name).read_text() for name in ("metrics.py", "eval/held_out.py"))
    names = set(re.findall(r'metrics\["(\w+)"\]', code)) | {"selected_fraction", "rollout_age", "loss", "positions"}
    names |= {f"{divergence}_selected" for divergence in DIVERGENCES}
    names |= {f"{part}_share" for part in PARTS} | {"flops_per_second", "floor_share", "rollout_share", "other_seconds"}
    for name in names | {"cut_fraction", "empty_completions", "completion_length", "tokens_per_second"}:
        assert f"`{name}`" in page or f"`eval_{name}`" in page, name


def test_the_citation_has_the_version_of_the_package():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.M)[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
