"""`sekd recipes` lists what sekd ships, and `sekd recipes show` prints a recipe, merged with its base."""

from pathlib import Path

import pytest

from sekd.cli import main
from sekd.notation import load_yaml
from sekd.parse import find_recipe, list_recipes, parse_recipe, read_recipe


def test_every_recipe_is_listed_in_a_line_with_a_sentence(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*list_recipes()]
    for line in lines:
        summary = line.split(maxsplit=1)[1]
        assert len(line) <= 120, line
        assert summary.endswith("."), line
        assert len(summary) > 20
        assert "sekd train" not in summary


def test_a_recipe_without_a_base_is_shown_as_it_is(capsys):
    assert main(["recipes", "show", "gsm8k_on_policy_sekd"]) == 0
    assert capsys.readouterr().out == Path(find_recipe("gsm8k_on_policy_sekd")).read_text()


@pytest.mark.parametrize("name", list_recipes())
def test_a_shown_recipe_is_whole(name, capsys, tmp_path, monkeypatch):
    """It names no base, so it can be copied anywhere."""
    assert main(["recipes", "show", name]) == 0
    text = capsys.readouterr().out
    assert text.startswith(Path(find_recipe(name)).read_text().split("\n\n")[0].split("\nbase:")[0])
    assert load_yaml(text) == read_recipe(find_recipe(name))
    assert "base" not in load_yaml(text)


BASE = """\
# What the base is for.
output_dir: runs/base

# how much of it
position_fraction: 0.5 # half
# two lines
# about the score
position_score:
  # inside
  kl: 1.0 # a weight

  student_ce: 2.0
prompt_template: |
  # not a comment
  {prompt}

seed: 1 # of the base
# the end
"""
OWN = """\
# What the recipe is for.
# It is another one.
base: base.yaml
output_dir: runs/own

# a new key
max_steps: 5 # few
# better
position_fraction:
  # steps
  0: 1.0
  4: 0.2 # from here on
seed: 2"""
MERGED = """\
# What the recipe is for.
# It is another one.
output_dir: runs/own

# better
position_fraction:
  # steps
  0: 1.0
  4: 0.2 # from here on
# two lines
# about the score
position_score:
  # inside
  kl: 1.0 # a weight

  student_ce: 2.0
prompt_template: |
  # not a comment
  {prompt}

seed: 2

# a new key
max_steps: 5 # few
"""


def show(folder, base, own, capsys):
    (folder / "base.yaml").write_text(base)
    (folder / "own.yaml").write_text(own)
    assert main(["recipes", "show", str(folder / "own.yaml")]) == 0
    text = capsys.readouterr().out
    assert load_yaml(text) == read_recipe(str(folder / "own.yaml"))
    return text


def test_comments_of_a_recipe_and_of_its_base_stay_with_their_keys(tmp_path, capsys):
    assert show(tmp_path, BASE, OWN, capsys) == MERGED


@pytest.mark.parametrize(
    "base",
    [
        "{}",
        "{seed: 1, eos: x}",
        "seed: &n 1\nmax_steps: *n",
        "--- # first\nseed: 1",
        "seed: 1\nseed: 3",
        "'se\\x65d': 1",
    ],
    ids=["empty", "on one line", "an alias", "a marker", "twice", "an escape"],
)
def test_any_yaml_is_shown_with_its_values(tmp_path, capsys, base):
    """Some of it without comments."""
    show(tmp_path, base, "base: base.yaml\nseed: 2\nlogging_steps: 7\n", capsys)


def test_a_shown_recipe_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "show", "gsm8k_on_policy_lora"]) == 0
    Path("mine.yaml").write_text(capsys.readouterr().out)
    _, args, model = parse_recipe("mine.yaml")
    assert (args.sample_fraction, args.divergence, model.lora_target_modules) == (0.2, "reverse_kl", "all-linear")


def test_what_cannot_be_shown_is_one_line(capsys, tmp_path):
    assert main(["recipes", "show", "nowhere"]) == 2
    assert "recipe 'nowhere': no such file" in capsys.readouterr().err
    (tmp_path / "x.yaml").write_text("base: nowhere\n")
    assert main(["recipes", "show", str(tmp_path / "x.yaml")]) == 2
    assert "x.yaml': base: recipe 'nowhere': no such file" in capsys.readouterr().err
