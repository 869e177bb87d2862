"""A run in the terminal."""

import io
import json
import os
import pty
import subprocess
import sys

import pytest
from helpers import make_trainer
from rich.console import Console

from sekd.cli import main
from sekd.report.read import read_run
from sekd.report.watch import BLOCKS, draw_line, make_view


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, pairs):
    folder = tmp_path_factory.mktemp("watched") / "run"
    make_trainer(folder, tokenizer, pairs, lmbda=1.0, max_steps=6, record_selection=1, save_rollouts=True).train()
    return folder


def show(folder, **options):
    console = Console(file=io.StringIO(), width=120, **options)
    console.print(make_view(read_run(str(folder), None)))
    return console.file.getvalue()


def test_a_finished_run_shows_its_curves_rollouts_and_selection(folder, capsys):
    assert main(["watch", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "finished" in out
    assert "step 6 of 6" in out
    assert "Loss" in out
    last = json.loads((folder / "rollouts.jsonl").read_text().splitlines()[-1])
    assert last["completion"].split()[0] in out
    assert "selection after 6 steps" in out
    first = read_run(str(folder), None).snapshots[-1].samples[0]["input_ids"][0]
    assert f"w{first}" in out


def test_an_unfinished_run_shows_how_long_it_takes(folder, tmp_path):
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "run")], check=True)
    log = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()][:2]
    lines[1]["train_seconds"] = 60.0
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": ')
    out = show(tmp_path / "run")
    assert "step 2 of 6, 1 min 00 s so far, about 2 min 00 s left" in out
    assert "unfinished" in out
    assert "1 damaged line" in out


def test_texts_of_models_do_not_steer_the_terminal(folder, tmp_path):
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "run")], check=True)
    hostile = "\x1b[31mred\x1b]0;title\x07 \u202e[bold]x[/bold]"
    line = {"step": 5, "prompt": hostile, "completion": hostile}
    (tmp_path / "run" / "rollouts.jsonl").write_text(json.dumps(line) + "\n")
    out = show(tmp_path / "run")
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[bold]x[/bold]" in out


def test_the_live_view_ends_with_the_run(folder):
    """In a terminal a finished run is shown, and the command ends."""
    main_end, end = pty.openpty()
    command = [sys.executable, "-m", "sekd.cli", "watch", str(folder)]
    with subprocess.Popen(
        command, stdout=end, stderr=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(end)
        seen = b""
        while True:
            try:
                part = os.read(main_end, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen += part
        assert process.wait(60) == 0
    os.close(main_end)
    assert b"finished" in seen


def test_a_curve_is_drawn_from_low_to_high():
    assert draw_line([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == BLOCKS
    assert draw_line([*range(800)], width=8) == BLOCKS
    assert draw_line([1.0, 1.001]) == BLOCKS[0] * 2
    assert draw_line([float("nan")]) == ""
    assert draw_line([0.0, 0.0]) == BLOCKS[0] * 2


def test_wrong_seconds_are_refused(folder, capsys):
    assert main(["watch", str(folder), "--every", "0"]) == 2
    assert "--every 0 must be above 0" in capsys.readouterr().err
