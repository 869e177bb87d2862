"""What a report reads of runs, also of runs that are damaged, unfinished or of another version."""

import io
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from helpers import make_trainer
from rich.console import Console

from sekd.cli import main
from sekd.eval.records import Item, Score, TaskResult
from sekd.eval.result_files import name_folder, save_result
from sekd.eval.snapshots import FOLDER, list_snapshots
from sekd.metric_kinds import ACCURACY
from sekd.report.charts import thin_out
from sekd.report.page import find_times, make_page, write_report
from sekd.report.read import FINISHED, RUNNING, UNFINISHED, RunRecord, find_last, read_run, read_runs
from sekd.report.watch import make_view
from sekd.run_folder import lock_run
from sekd.sweep.scores import Column
from sekd.sweep.table import Line, write_results

HOLD = """
import sys, time
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
    tmp_path.mkdir(exist_ok=True)
    subprocess.run(["cp", "-r", str(runs / name), str(folder)], check=True)
    return folder


def test_runs_that_differ_in_the_seed_are_a_group(runs):
    found = read_runs([str(runs / name) for name in ("sekd-seed_0", "random", "sekd-seed_1")], "none")
    read = found.runs
    assert [run.label for run in read] == ["sekd, seed 42", "random", "sekd, seed 1"]
    assert [run.group for run in read] == ["sekd", "random", "sekd"]
    assert [run.status for run in read] == [FINISHED] * 3
    assert [run.done for run in read] == [4] * 3
    assert not [note for run in read for note in run.notes]
    assert not found.references
    assert not found.sweeps
    assert not found.notes


def test_only_the_seed_may_differ_in_a_group(runs, tmp_path):
    folders = []
    for name, key in (("a", "model_name_or_path"), ("b", "teacher_model_name_or_path"), ("c", "rollouts")):
        folder = copy_run(runs, tmp_path / name, "sekd-seed_0")
        keys = yaml.safe_load((folder / "recipe.yaml").read_text())
        (folder / "recipe.yaml").write_text(yaml.safe_dump(keys | {key: "another"}))
        folders.append(str(folder))
    again = f"{folders[0]}/."
    found = read_runs([str(runs / "sekd-seed_0"), *folders, again], "none")
    assert [run.group for run in found.runs] == ["sekd-seed_0", "run", "run (2)", "run (3)"]
    same = copy_run(runs, tmp_path / "d", "sekd-seed_0")
    labels = [run.label for run in read_runs([str(runs / "sekd-seed_0"), str(same)], "none").runs]
    assert labels == ["sekd, seed 42", f"sekd, seed 42 ({same})"]


@pytest.mark.parametrize("content", ["{", "[]", '{"lines": [1]}', '{"lines": [], "columns": []}', '{"sweep": "old"}'])
def test_the_table_of_another_version_is_refused(tmp_path, capsys, content):
    (tmp_path / "results.json").write_text(content)
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "r.html")]) == 2
    assert "sekd sweep FILE --only-table" in capsys.readouterr().err


def test_a_sweep_and_other_runs_share_a_page(runs, tmp_path):
    sweep, output = tmp_path / "sweep", str(tmp_path / "evaluations")
    sweep.mkdir()
    subprocess.run(["cp", "-r", str(runs / "random"), str(sweep / "random")], check=True)
    lines = [Line("Random", "", {42: 0}, {42: "random"}), Line("Gone", "", {42: 1}, {42: "gone"})]
    column = Column("accuracy", ACCURACY, [0.5, 0.6], [None] * 2, is_main=True)
    write_results(str(sweep), [column], lines, None, {"sweep": "s.yaml", "baseline": None})
    other = copy_run(runs, tmp_path)
    for folder in (other, sweep / "random"):
        items = [Item(index=0, prompt="p", answer="a", outputs=("a",), correct=1.0)]
        result = TaskResult("gsm8k", "math_verify", {"math_verify": Score(0.5, None, 1)}, items, {}, 1.0)
        save_result(name_folder(output, str(folder)), {"name": "m", "fingerprint": "f"}, result)
    report = write_report([str(sweep), str(other)], str(tmp_path / "r.html"), evaluations=output)
    assert report.notes == [f"The run gone of Gone is missing in {sweep}."]
    assert [table.title for table in report.tables] == ["Sweep s.yaml", "Evaluations"]
    assert [row[0].text for row in report.tables[1].rows] == ["run"]


def test_a_sweep_whose_runs_are_gone_still_gives_its_table(tmp_path):
    column = Column("accuracy", ACCURACY, [0.5], [None], is_main=True)
    write_results(
        str(tmp_path), [column], [Line("Gone", "", {0: 0}, {0: "gone"})], None, {"sweep": "s", "baseline": None}
    )
    report = write_report([str(tmp_path)], str(tmp_path / "r.html"))
    assert report.runs == []
    assert [table.title for table in report.tables] == ["Sweep s"]


def test_times_are_seconds_of_a_finished_run_and_shares_before(runs):
    logs = read_run(str(runs / "random"), None).logs
    seconds, shares = find_times(logs)
    last = logs[-1]
    assert dict(seconds) == {part: last[f"{part}_seconds"] for part, _ in seconds}
    assert sum(value for _, value in seconds) == pytest.approx(find_last(logs, "train_seconds"), rel=1e-6)
    assert find_times(logs[:-1]) == ([], shares)
    assert 0 < sum(share for _, share in shares) <= 1
    assert find_last([*logs, {"step": 4, "eval_loss": 1.0}], "peak_memory_gb") == last["peak_memory_gb"] > 0


def test_an_epoch_says_how_many_steps_a_run_has():
    logs = [{"step": 10, "epoch": 0.5}, {"step": 20, "eval_loss": 1.0}]
    run = RunRecord("x", "x", "x", {"max_steps": -1, "num_train_epochs": 3.0}, logs, UNFINISHED)
    assert run.max_steps == 60
    assert replace(run, logs=[]).max_steps is None
    assert replace(run, keys={"max_steps": 7}).max_steps == 7


@pytest.mark.parametrize("number", [7, 50, 1000])
def test_a_thin_curve_keeps_its_ends_and_extremes(number):
    points = [(step, math.sin(step / 50) + (step == 777) * 9) for step in range(3000)]
    thin = thin_out(points, number)
    assert thin[0] == points[0]
    assert thin[-1] == points[-1]
    assert points[777] in thin
    assert thin == sorted(thin)
    assert len(thin) <= number + 4
    assert thin_out(points, 3000) == points


def test_a_page_has_the_selection_of_one_seed(runs, tmp_path):
    report = write_report([str(runs / f"sekd-seed_{seed}") for seed in (1, 0)], str(tmp_path / "r.html"))
    page = make_page(report)
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [run["selection"] is not None for run in data["runs"]] == [True, False]


def test_damaged_lines_are_skipped_and_counted(runs, tmp_path):
    folder = copy_run(runs, tmp_path)
    log = folder / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole.replace('"step": 2', '"step": ', 1)[:-20])
    run = read_run(str(folder), None)
    assert len(run.logs) == len(whole.splitlines()) - 2
    assert run.notes == ["2 damaged lines of metrics.jsonl were skipped."]
    log.write_bytes(b"\xff\x00\n" + whole.encode())
    assert read_run(str(folder), None).notes == ["1 damaged line of metrics.jsonl was skipped."]


def test_a_run_is_finished_running_or_unfinished(runs, tmp_path):
    folder = copy_run(runs, tmp_path)
    log = folder / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "train_loss" not in line))
    assert read_run(str(folder), None).status == UNFINISHED
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert read_run(str(folder), None).status == RUNNING
        process.send_signal(signal.SIGKILL)
    assert read_run(str(folder), None).status == UNFINISHED


def test_reading_changes_nothing_and_lets_the_run_begin(runs):
    folder = runs / "random"
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}
    read_run(str(folder), None)
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
    run = read_run(str(folder), None)
    assert run.keys == {}
    assert [s.step for s in run.snapshots] == [0, 1, 3, 4]
    damaged, version, selection = run.notes
    assert damaged == "recipe.yaml is damaged."
    assert version.startswith("sekd 0.0.1 wrote this run, and sekd ")
    assert "0000002.safetensors" in selection
    (folder / "recipe.yaml").unlink()
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="is no run's folder"):
        read_runs([str(folder)], "none")


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
    found = read_runs([str(folder)], output)
    assert found.runs[0].results["gsm8k"].scores["math_verify"].value == 0.5
    assert [reference.label for reference in found.references] == ["teacher"]


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
    whole = (read_run(str(folder), None).snapshots[0].columns["sample"] == 0).sum().item()
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
