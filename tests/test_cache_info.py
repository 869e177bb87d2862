"""What a cache would take: the paper's table 6, and one's own."""

import json

import pytest
from cache_helpers import make_cache
from helpers import make_model

from sekd.cli import main


def plan(capsys, *arguments):
    status = main(["cache", "info", "--plan", *map(str, arguments)])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")


def row_of(shown, name):
    (line,) = (line for line in shown.splitlines() if f" {name} " in line)
    return [cell.strip() for cell in line.split("│")[2:-1]]


@pytest.mark.parametrize(("draws", "slots", "selected"), [(12, "3.60 TB", "720.00 GB"), (64, "19.20 TB", "3.84 TB")])
def test_the_papers_table(capsys, draws, slots, selected):
    status, shown, _ = plan(
        capsys, "--positions", "100e9", "--vocab", 100_000, "--draws", draws, "--sample-fraction", 0.2
    )
    assert status == 0
    # The paper's text has 200 kB a position in fp16, and its table half of that.
    assert row_of(shown, "Full KD, fp16 logits")[:2] == ["200,000.0", "20,000.00 TB"]
    assert row_of(shown, "RS-KD, fixed slots (paper)")[1] == slots
    assert row_of(shown, "SE-KD_3X, fixed slots (paper)")[1] == selected
    assert row_of(shown, "no teacher, token ids alone")[1] == "300.00 GB"


def test_a_small_cache_says_what_a_large_one_takes(tmp_path, tokenizer, pairs, capsys):
    folder = tmp_path / "cache"
    make_cache(folder, tokenizer, pairs)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    per_row = sum(s["bytes"] for s in shards) / sum(s["rows"] for s in shards)
    status, shown, _ = plan(capsys, folder, "--positions", "1e6", "--sample-fraction", 0.5)
    assert status == 0
    assert row_of(shown, "RS-KD, sekd (measured)")[0] == f"{per_row:,.1f}"
    assert row_of(shown, "SE-KD_3X, sekd (measured)")[0] == f"{per_row / 2:,.1f}"
    assert row_of(shown, "RS-KD, fixed slots (paper)")[0] == "48.0", "the cache's 16 draws"
    assert "50 % of the samples" in shown


def test_names_are_shown_as_they_are(tmp_path, tokenizer, pairs, capsys):
    """Neither as markup nor as emoji, nor as an escape sequence: a pulled manifest may hold any text."""
    folder = tmp_path / "c[v2][" / "v2]:warning:"
    make_cache(folder, tokenizer, pairs)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["fingerprint"]["teacher"]["name"] = "org/t[red]eacher[/v2] \x1b[2J"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main(["cache", "info", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "c[v2][/v2]:warning:" in "".join(shown.splitlines())
    assert "org/t[red]eacher[/v2] \\x1b[2J" in shown
    assert "\x1b" not in shown


def test_a_recipe_says_its_own_numbers(tmp_path, tokenizer, capsys):
    for name, kind in (("student", "tied"), ("teacher", "untied")):
        make_model(kind).save_pretrained(tmp_path / name)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}/run\nmodel_name_or_path: {tmp_path}/student\ndataset_name: x/y\nrollout_engine: hf\n"
        f"teacher_model_name_or_path: {tmp_path}/teacher\nclass_samples: 32\nsample_fraction: 0.2\nsample_pool: 1000\n"
        "max_length: 512\nmax_prompt_length: 500\nclass_selection: rs_kd\n"
    )
    status, shown, _ = plan(capsys, recipe)
    assert status == 0
    assert "512,000 positions, 128 classes, 32 draws, 20 % of the samples" in shown
    assert row_of(shown, "SE-KD_3X, sekd (before compression)")[0] == "19.4"
    status, shown, _ = plan(capsys, recipe, "--vocab", 1000, "--positions", 10)
    assert "10 positions, 1,000 classes" in shown


def test_what_a_plan_lacks_is_named(capsys):
    status, _, error = plan(capsys, "--positions", 5)
    assert status == 2
    assert "the plan needs --draws and --vocab, or a cache or recipe that says so" in error
    assert main(["cache", "info"]) == 2
    assert "name a cache's folder, or add --plan" in capsys.readouterr().err
    status, _, error = plan(capsys, "--positions", -5, "--vocab", 9, "--draws", 2)
    assert status == 2
    assert "--positions -5.0 must be above 0" in error
    status, _, error = plan(capsys, "--positions", 5, "--vocab", 9, "--draws", 65)
    assert "--draws 65: a cache holds at most 64" in error
