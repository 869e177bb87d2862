"""`sekd recipes` lists and prints what sekd ships."""

from pathlib import Path

from sekd.cli import main
from sekd.parse import list_recipes


def test_every_recipe_is_listed_with_a_sentence(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line for line in lines if not line.startswith(" ")]
    assert names == [*list_recipes()]
    for name in names:
        summary = lines[lines.index(name) + 1]
        assert summary.startswith("    ")
        assert len(summary) > 20
        assert "sekd train" not in summary


def test_a_recipe_is_printed_as_it_is(capsys):
    assert main(["recipes", "gsm8k_on_policy_sekd"]) == 0
    assert capsys.readouterr().out == Path(list_recipes()["gsm8k_on_policy_sekd"]).read_text()
    assert main(["recipes", "nowhere"]) == 2
    assert "recipe 'nowhere': no such file" in capsys.readouterr().err
