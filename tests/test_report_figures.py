"""Figures and tables of a report as files."""

import subprocess
import xml.etree.ElementTree as ElementTree

import matplotlib.image
import pytest
from helpers import make_trainer

from sekd.cli import main
from sekd.eval.snapshots import FOLDER, list_snapshots, read_snapshot, write_snapshot
from sekd.report.names import name_curve


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, pairs):
    """A run whose tokens have texts that are markup for something."""
    folder = tmp_path_factory.mktemp("figures") / "$run_0$"
    options = dict(eval_dataset=pairs.select(range(2)))
    make_trainer(
        folder, tokenizer, pairs, None, None, options, max_steps=4, record_selection=1, eval_strategy="epoch"
    ).train()
    for path in list_snapshots(str(folder / FOLDER)).values():
        snapshot = read_snapshot(path)
        tokens = snapshot.samples[0]["input_ids"]
        for place, text in enumerate(("$x_1$", "<b>&", "\n", "\x1b[31m", " ")):
            snapshot.texts[tokens[place % len(tokens)]] = text
        write_snapshot(str(folder / FOLDER), snapshot)
    return folder


def test_figures_and_tables_are_written(folder, tmp_path, capsys):
    out = tmp_path / "figures"
    arguments = ["report", str(folder), "--output", str(tmp_path / "r.html"), "--figures", str(out)]
    assert main(arguments) == 0
    names = {path.name for path in out.iterdir()}
    assert {"curves.svg", "curves.png", "selection_1.svg", "selection_1.png"} <= names
    printed = capsys.readouterr().out
    assert all(f"wrote {out / name}" in printed for name in names)
    for name in names:
        if name.endswith(".svg"):
            ElementTree.parse(out / name)
        elif name.endswith(".png"):
            picture = matplotlib.image.imread(out / name)
            assert picture[..., :3].min() < 0.5 < picture[..., :3].max(), "it is not blank"


def test_wrong_outputs_are_refused(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--output", str(tmp_path)]) == 2
    assert "is not a file; name one" in capsys.readouterr().err
    for option in ("--evaluations", "--figures"):
        place = tmp_path / "missing" if option == "--evaluations" else tmp_path / "file"
        (tmp_path / "file").write_text("")
        assert main(["report", str(folder), "--output", str(tmp_path / "r.html"), option, str(place)]) == 2
        assert f"{option} '{place}'" in capsys.readouterr().err
    assert main(["report", str(folder), "--output", str(tmp_path / "file" / "r.html")]) == 2
    assert "file" in capsys.readouterr().err


def test_without_snapshots_there_is_no_picture_of_a_selection(folder, tmp_path):
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "run")], check=True)
    subprocess.run(["rm", "-r", str(tmp_path / "run" / FOLDER)], check=True)
    out = tmp_path / "figures"
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "r.html"), "--figures", str(out)]) == 0
    assert not [*out.glob("selection*")]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loss", ("Loss", "")),
        ("reverse_kl_selected", ("KL(q‖p) at chosen positions", "nats")),
        ("rs_kd_forward_kl_selected", ("rs kd forward KL at chosen positions", "nats")),
        ("eval_forward_kl", ("Held-out KL(p‖q)", "nats")),
        ("eval_perplexity", ("Held-out perplexity", "")),
        ("eval_gsm8k_math_verify", ("Held-out gsm8k math verify", "")),
    ],
)
def test_logged_numbers_have_names_in_words(name, words):
    assert name_curve(name) == words
