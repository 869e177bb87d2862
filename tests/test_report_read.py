"""What a report reads of runs, also of runs that are damaged, unfinished or of another version."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from helpers import make_trainer
from rich.console import Console

from sekd.cli import main
from sekd.eval.records import Item, Score, TaskResult
from sekd.eval.result_files import name_folder, save_result
from sekd.eval.snapshots import FOLDER, list_snapshots
from sekd.report.page import write_report
from sekd.report.read import FINISHED, RUNNING, UNFINISHED, read_run, read_runs
from sekd.report.watch import make_view
from sekd.run_folder import lock_run

HOLD = """
import sys, time
from sekd.report.watch import make_view
from sekd.run_folder import lock_run
with lock_run(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer, pairs):
    """Two runs that differ in the seed, and one with other positions."""
    folder = tmp_path_factory.mktemp("runs")
    for name, choices in (("sekd-seed_0", {}), ("sekd-seed_1", {"seed": 1}), ("random", {"position_policy": "random"})):
        make_trainer(folder / name, tokenizer, pairs, record_selection=1, max_steps=4, **choices).train()
    return folder


def copy_run(runs, tmp_path, name="sekd-seed_0"):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(runs / name), str(folder)], check=True)
    return folder


def test_runs_that_differ_in_the_seed_are_a_group(runs):
    read, references, sweeps = read_runs([str(runs / name) for name in ("sekd-seed_0", "random", "sekd-seed_1")], "")
    assert [run.label for run in read] == ["sekd, seed 42", "random", "sekd, seed 1"]
    assert [run.group for run in read] == ["sekd", "random", "sekd"]
    assert [run.status for run in read] == [FINISHED] * 3
    assert [run.done for run in read] == [4] * 3
    assert not [note for run in read for note in run.notes]
    assert not references
    assert not sweeps


def test_damaged_lines_are_skipped_and_counted(runs, tmp_path):
    folder = copy_run(runs, tmp_path)
    log = folder / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole.replace('"step": 2', '"step": ', 1)[:-20])
    run = read_run(str(folder), "")
    assert len(run.logs) == len(whole.splitlines()) - 2
    assert run.notes == ["2 damaged lines of metrics.jsonl were skipped."]
    log.write_bytes(b"\xff\x00\n" + whole.encode())
    assert read_run(str(folder), "").notes == ["1 damaged line of metrics.jsonl was skipped."]


def test_a_run_is_finished_running_or_unfinished(runs, tmp_path):
    folder = copy_run(runs, tmp_path)
    log = folder / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "train_loss" not in line))
    assert read_run(str(folder), "").status == UNFINISHED
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert read_run(str(folder), "").status == RUNNING
        process.send_signal(signal.SIGKILL)
    assert read_run(str(folder), "").status == UNFINISHED


def test_reading_changes_nothing_and_lets_the_run_begin(runs):
    folder = runs / "random"
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}
    read_run(str(folder), "")
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}
    with lock_run(str(folder)):
        pass


def test_what_is_missing_or_damaged_is_named(runs, tmp_path):
    folder = copy_run(runs, tmp_path)
    versions = json.loads((folder / "versions.json").read_text())
    (folder / "versions.json").write_text(json.dumps(versions | {"sekd": "0.0.1"}))
    (folder / "recipe.yaml").write_text("a: [")
    snapshot = list_snapshots(str(folder / FOLDER))[2]
    os.truncate(snapshot, 100)
    run = read_run(str(folder), "")
    assert run.keys == {}
    assert [s.step for s in run.snapshots] == [0, 1, 3, 4]
    damaged, version, selection = run.notes
    assert damaged == "recipe.yaml is damaged."
    assert version.startswith("sekd 0.0.1 wrote this run, and sekd ")
    assert "0000002.safetensors" in selection
    (folder / "recipe.yaml").unlink()
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="is no run's folder"):
        read_runs([str(folder)], "")


def test_evaluations_of_runs_and_of_their_models_are_read(runs, tmp_path):
    folder = copy_run(runs, tmp_path)
    (folder / "recipe.yaml").write_text(
        (folder / "recipe.yaml").read_text() + "teacher_model_name_or_path: some/teacher\n"
    )
    output = str(tmp_path / "evaluations")
    items = [Item(index=0, prompt="p", answer="a", outputs=("a",), correct=1.0)]
    result = TaskResult("gsm8k", "math_verify", {"math_verify": Score(0.5, None, 1)}, items, {}, 1.0)
    for model in (str(folder), "some/teacher"):
        save_result(name_folder(output, model), {"name": model, "fingerprint": "f"}, result)
    read, references, _ = read_runs([str(folder)], output)
    assert read[0].results["gsm8k"].scores["math_verify"].value == 0.5
    assert [reference.label for reference in references] == ["teacher"]


@pytest.mark.parametrize("command", ["report", "watch"])
def test_wrong_folders_are_refused(tmp_path, capsys, command):
    for folder, words in ((tmp_path / "none", "there is no folder"), (tmp_path, "is no run's folder")):
        assert main([command, str(folder)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "recipe",
    [
        "1: x\n2026-01-01: y\nseed: [1]\n",
        "position_policy: [a]\nclass_selection: {a: 1}\nper_device_train_batch_size: '8'\nmax_steps: many\n",
        "class_selection: [a]\nposition_fraction: lots\nlearning_rate: fast\ngradient_accumulation_steps: null\n",
        "position_policy: mine\nposition_score: mine\nimport_modules: [mine]\n",
        "[1, 2]",
        "",
    ],
)
def test_a_recipe_with_any_values_gives_a_page(runs, tmp_path, recipe):
    folder = copy_run(runs, tmp_path)
    (folder / "recipe.yaml").write_text(recipe)
    lines = [
        {"step": 1, "train_seconds": "x", "peak_memory_gb": [1], "teacher_share": "y", "loss": 1.0},
        {"step": 2, "\ud800": 1.0, "loss": 0.5, "eval_forward_kl": "z"},
    ]
    nested = "[" * 100_000
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + nested + "\n")
    report = write_report([str(folder)], str(tmp_path / "r.html"))
    assert "1 damaged line of metrics.jsonl was skipped." in report.runs[0].notes
    assert [log["step"] for log in report.runs[0].logs] == [1, 2]
    Console(file=io.StringIO()).print(make_view(report.runs[0]))


def test_a_folder_may_have_any_name(runs, tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"r\xff\xfe")
    subprocess.run([b"cp", b"-r", os.fsencode(runs / "random"), folder], check=True)
    write_report([os.fsdecode(folder)], str(tmp_path / "r.html"))
    assert "random" in (tmp_path / "r.html").read_text()


def test_long_sequences_are_cut_and_a_note_says_so(runs, tmp_path, monkeypatch):
    folder = copy_run(runs, tmp_path)
    whole = (read_run(str(folder), "").snapshots[0].columns["sample"] == 0).sum().item()
    assert whole > 2
    monkeypatch.setattr("sekd.report.page.MAX_POSITIONS", 10)  # 2 of each of five snapshots
    write_report([str(folder)], str(tmp_path / "r.html"))
    page = (tmp_path / "r.html").read_text()
    assert "The page has the first 2 positions of each recorded sequence." in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    (sample,) = data["runs"][0]["selection"]["samples"]
    assert len(sample["positions"]) == 2
    assert len(sample["tokens"]) == sample["positions"][-1] + 2
    assert all(len(snapshot["weight"]) == 2 for snapshot in sample["snapshots"])
