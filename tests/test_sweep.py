"""Whole sweeps on tiny models: killed, stopped, failing and through Ray, they end as an undisturbed one."""

import contextlib
import csv
import importlib
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from evaluation_helpers import make_rows
from helpers import make_pairs, make_tokenizer, save_pair

from sekd.cli import main
from sekd.files import lock_folder
from sekd.sweep.engines import ENGINES, EngineKind
from sekd.sweep.file import read_sweep
from sekd.sweep.run_state import finish as note_end

# Dozens of processes; one worker runs them all, since they share an undisturbed sweep.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.xdist_group("sweeps")]

RECIPE = {
    **{"max_steps": 48, "save_steps": 4, "logging_steps": 4, "per_device_train_batch_size": 4, "bf16": False},
    **{"teacher_dtype": "float32", "report_to": "none", "learning_rate": 1e-3, "max_length": 32},
    **{"eval_strategy": "steps", "eval_steps": 48, "max_eval_samples": 8, "max_prompt_length": 16},
    **{"dataset_train_split": "train[8:]", "dataset_test_split": "train[:8]"},
}
METHODS = {"Full KD": {"position_policy": "all"}, "SE-KD": {}, "RandomPos": {"position_policy": "random"}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a pair, data, a recipe, and rows of a benchmark."""
    folder = tmp_path_factory.mktemp("inputs")
    save_pair(folder, make_tokenizer())
    make_pairs().to_json(folder / "pairs.jsonl")
    names = {"model_name_or_path": "student", "teacher_model_name_or_path": "teacher", "dataset_name": "pairs.jsonl"}
    keys = RECIPE | {key: str(folder / name) for key, name in names.items()}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
    (folder / "arc_easy").mkdir()
    for seed, split in enumerate(("test", "validation")):
        rows = make_rows("arc_easy", 12, seed)
        (folder / "arc_easy" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def write(inputs):
    """A function that writes a sweep file into a new folder, which gets the sweep too."""

    def write(folder, **changes):
        content = {"recipe": str(inputs / "recipe.yaml"), "output_dir": str(folder / "sweep"), "seeds": [1, 2]}
        content |= {"methods": METHODS, "baseline": "Full KD", **changes}
        path = folder / "file.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(path)

    return write


class Plain:
    """An engine that runs each job to its end in this process, where nothing needs to be imported again."""

    def __init__(self, jobs):
        self.jobs, self.ended = 1, []

    @property
    def running(self):
        return [job for job, _ in self.ended]

    def start(self, job):
        Path(job.log).parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            status = main([*job.arguments])
        if status == 0 and job.finished:
            note_end(job.finished, 0)
        self.ended.append((job, status))

    def wait(self, seconds):
        ended, self.ended = self.ended, []
        return ended

    def close(self):
        pass


@pytest.fixture(autouse=True, scope="module")
def _plain_engine():
    """The engine ``plain``, with the one thread that the processes of a sweep have here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ENGINES["plain"] = EngineKind(Plain)
    yield
    del ENGINES["plain"]
    torch.set_num_threads(threads)


def run_plainly(path):
    assert main(["sweep", path, "--engine", "plain"]) == 0


def start(path, *flags):
    """``sekd sweep`` in a process group of its own, its output in a file beside the sweep file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "sekd.cli", "sweep", path, "--jobs", "2", *flags]
    with open(Path(path).parent / "printed.txt", "ab") as printed:
        return subprocess.Popen(
            command, stdout=printed, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def finish(path, *flags):
    process = start(path, *flags)
    assert process.wait(1500) == 0, (Path(path).parent / "printed.txt").read_text()[-3000:]


def read_results(folder):
    """The weights of every run, and the table without its costs."""
    weights = {path.parent.name: path.read_bytes() for path in (folder / "sweep").glob("*/model.safetensors")}
    rows = [*csv.reader((folder / "sweep" / "table.csv").open())]
    return weights, [row for row in rows if row[2] not in ("training s", "memory GB")]


def list_processes(folder):
    """The processes whose command names a folder."""
    names = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
        except OSError:
            continue
        if str(folder / "sweep").encode() in text:
            names.append(path.parent.name)
    return names


def wait_for(condition, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def count_checkpoints(folder):
    return len([*(folder / "sweep").glob("*/checkpoint-*")])


PROOF = {
    "methods": METHODS | {"Full KD": METHODS["Full KD"] | {"grid": {"learning_rate": [1e-3, 1e-2]}}},
    "seeds": [1],
    "keys": {"metric_for_best_model": "forward_kl"},
}


@pytest.fixture(scope="module")
def whole(write, tmp_path_factory):
    """What an undisturbed sweep gives: 3 methods, one of them with 2 learning rates."""
    folder = tmp_path_factory.mktemp("whole")
    run_plainly(write(folder, **PROOF))
    weights, rows = read_results(folder)
    assert len(weights) == 4
    assert len({*weights.values()}) == 4
    assert {row[0] for row in rows[1:]} == {*METHODS}
    return weights, rows


# Two of the 4 runs are under way at each of these numbers of checkpoints, of which a run has 12.
KILLS = [("local", 3, False), ("ray", 9, False), ("local", 29, True), ("ray", 35, True)]


def test_a_sweep_that_each_engine_is_killed_in_twice_equals_one_that_ran_through(write, whole, tmp_path):
    """The engines resume each other's runs. Without Ray, it is one engine."""
    has_ray = importlib.util.find_spec("ray") is not None
    path = write(tmp_path, **PROOF)
    for name, at, kills_runs in KILLS:
        process = start(path, "--engine", name if has_ray else "local")
        wait_for(lambda at=at, process=process: count_checkpoints(tmp_path) >= at or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "printed.txt").read_text()[-3000:]
        process.kill()
        # Ray needs a moment to end its runs, in which they could finish.
        for run in list_processes(tmp_path) if kills_runs else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(run), signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        wait_for(lambda: not list_processes(tmp_path), 30)  # no orphan writes on
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "sweep").glob("*/model.safetensors")}
    assert 0 < len(before) < 4
    finish(path, "--engine", "ray" if has_ray else "local")
    assert {p: p.stat().st_mtime_ns for p in before} == before, "a finished run ran again"
    states = [json.loads(p.read_text()) for p in (tmp_path / "sweep").glob("*/sweep.json")]
    assert sum(state["resumed"] for state in states) >= 2, "runs were killed in their training"
    assert read_results(tmp_path) == whole


def test_a_sweep_evaluates_chooses_and_compares(write, inputs, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    evaluation = {"data_dir": [str(inputs)], "backend": "hf", "dtype": "float32"}
    path = write(
        tmp_path,
        methods={"Full KD": {"position_policy": "all", "grid": {"learning_rate": [1e-3, 3e-2]}}, "SE-KD": None},
        seeds=[1],
        validation={"tasks": "arc_easy@validation", **evaluation},
        test={"tasks": ["arc_easy"], **evaluation},
        references={"The teacher": str(inputs / "teacher")},
    )
    run_plainly(path)
    folder = tmp_path / "sweep"
    tested = {p.parent.parent.name for p in folder.glob("*/evaluations/test-*")}
    assert len(tested) == 2, "the other point was not tested"
    scores = {}
    for file in folder.glob("*/evaluations/validation-*/*/results.json"):
        (result,) = json.loads(file.read_text())["results"].values()
        scores[file.parts[-5]] = result["scores"]["acc"]["value"]
    assert scores.keys() == {f"Full_KD-learning_rate_{rate}-seed_1" for rate in ("0.001", "0.03")}
    (chosen,) = [name for name in tested if name.startswith("Full")]
    assert scores[chosen] == max(scores.values())
    table = (folder / "table.md").read_text().splitlines()
    assert table[0].startswith(
        "| method | learning_rate | seeds | arc_easy acc % | arc_easy ece % ↓ | training s | memory GB |"
    )
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["The teacher", "Full KD", "SE-KD"]
    assert "(" in table[4]

    logs = {p: p.stat().st_size for p in folder.rglob("*.log")}
    assert main(["sweep", path]) == 0
    assert {p: p.stat().st_size for p in folder.rglob("*.log")} == logs, "something ran again"
    (folder / "table.csv").unlink()
    assert main(["sweep", path, "--only-table"]) == 0
    assert (folder / "table.csv").exists()
    assert main(["sweep", path, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("finished ") == 3

    shutil.rmtree(folder / "references")
    finish(path)
    assert (folder / "table.md").read_text().splitlines() == table, "as a process of its own evaluates"


def test_other_seeds_train_the_chosen_point_alone(write, tmp_path, capsys, monkeypatch):
    """Of 2 learning rates and 3 seeds, 4 runs; the next call has nothing to do. A method may have fewer seeds."""
    methods = {"SE-KD": {"grid": {"learning_rate": [1e-3, 1e-2]}}, "Full KD": {"position_policy": "all", "seeds": [1]}}
    keys = {"metric_for_best_model": "forward_kl"}
    path = write(tmp_path, methods=methods, seeds=[1, 2, 3], grid_seeds=[1], keys=keys)
    assert main(["sweep", path, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("run if chosen ") == 4
    assert "3 runs choose the points of the grids; then 2 of 4 follow there" in printed
    run_plainly(path)
    weights, _ = read_results(tmp_path)
    scores = {}
    for rate in ("0.001", "0.01"):
        logs = (tmp_path / "sweep" / f"SE-KD-learning_rate_{rate}-seed_1" / "metrics.jsonl").read_text().splitlines()
        (scores[rate],) = [log["eval_forward_kl"] for log in map(json.loads, logs) if "eval_forward_kl" in log]
    best = min(scores, key=scores.get)
    assert weights.keys() == {
        *(f"SE-KD-learning_rate_{rate}-seed_1" for rate in scores),
        *(f"SE-KD-learning_rate_{best}-seed_{seed}" for seed in (2, 3)),
        "Full_KD-seed_1",
    }
    table = (tmp_path / "sweep" / "table.md").read_text()
    assert "over the seeds 1\n" in table
    assert "not finished" not in table
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "sweep").glob("*/model.safetensors")}
    run_plainly(path)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "sweep").glob("*/model.safetensors")} == written

    # What the study in docs/results.md takes from a sweep.
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    script, sweep, output = importlib.import_module("study_data"), read_sweep(path), str(tmp_path / "study")
    script.write_scores(sweep, output)
    script.write_seconds(sweep, output, steps=2, rounds=1)
    files = [[*csv.DictReader(open(f"{output}{end}.csv"))] for end in ("", "_grid", "_seconds")]  # noqa: SIM115
    of_study, grid, seconds = files
    of_table = [*csv.DictReader((tmp_path / "sweep" / "table.csv").open())]
    for own, shown in zip(of_study, of_table, strict=True):
        assert [own[name] for name in ("method", "point", "score", "mean", "seeds")] == [
            shown[name] for name in ("method", "point", "score", "mean", "seeds")
        ]
        assert own["deviation"] == shown["standard_deviation"]
        assert (own["difference_to_baseline"], own["stderr_to_baseline"]) == (
            shown["difference"],
            shown["difference_stderr"],
        )
        assert own["difference_to_random"] == ""
    assert {row["point"].split()[1]: float(row["values"]) for row in grid} == scores
    for row in seconds:
        assert float(row["seconds"]) == float(row["seconds_per_step"]) * 48 > 0
        assert float(row["lower_quartile"]) <= float(row["seconds_per_step"]) <= float(row["upper_quartile"])
    explain = importlib.import_module("explain_selection")
    before, after = explain.measure_students(sweep, ["SE-KD"])
    assert (before[0], after[0]) == ("Student before", "SE-KD")
    logs = [(tmp_path / "sweep" / f"SE-KD-learning_rate_{best}-seed_{n}" / "metrics.jsonl") for n in (1, 2, 3)]
    means = [json.loads(path.read_text().splitlines()[-2])["eval_forward_kl"] for path in logs]
    uncertain, others = after[1], after[4]
    share = (statistics.fmean(means) - others) / (uncertain - others)
    assert 0.2 <= share < 0.3, "the two parts make up the mean over all positions"
    assert after[1:] != before[1:]


def test_a_failed_run_is_reported_and_the_others_continue(write, tmp_path):
    path = write(tmp_path, methods={"A": {}, "Lost": {"dataset_name": str(tmp_path / "late.jsonl")}}, seeds=[1])
    content = yaml.safe_load(Path(path).read_text())
    Path(path).write_text(yaml.safe_dump(content | {"baseline": "A"}, sort_keys=False))
    assert start(path).wait(300) == 1
    printed = (tmp_path / "printed.txt").read_text()
    assert "failed: Lost, seed 1: exit status 2: sekd: " in printed
    assert "late.jsonl" in printed
    assert f"({tmp_path / 'sweep' / 'Lost-seed_1' / 'train.log'})" in printed
    assert "| A |" in (tmp_path / "sweep" / "table.md").read_text()
    assert "1 of 2 runs are not finished" in printed
    make_pairs().to_json(tmp_path / "late.jsonl")
    run_plainly(path)
    assert "| Lost |" in (tmp_path / "sweep" / "table.md").read_text()


@pytest.mark.parametrize(("number", "status", "jobs"), [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 1)])
def test_ctrl_c_stops_the_runs_and_says_what_is_left(write, tmp_path, number, status, jobs):
    path = write(tmp_path, seeds=[1], keys={"max_steps": 100000, "save_steps": 1000, "eval_steps": 100000})
    process = start(path, "--jobs", str(jobs))
    logs = (tmp_path / "sweep").glob
    wait_for(lambda: sum(path.stat().st_size > 0 for path in logs("*/metrics.jsonl")) == jobs)
    process.send_signal(number)
    assert process.wait(120) == status
    assert not list_processes(tmp_path)
    printed = (tmp_path / "printed.txt").read_text()
    assert "sekd: stopped in training: 0 of 3 are done, 3 are left; the same command resumes" in printed
    assert count_checkpoints(tmp_path) >= jobs, "SIGTERM lets a run save a checkpoint"


def test_two_sweeps_in_one_folder(write, tmp_path, capsys):
    with lock_folder(str(tmp_path / "sweep"), ValueError("taken")):
        assert main(["sweep", write(tmp_path), "--engine", "plain"]) == 2
    assert "another sweep is writing into output_dir" in capsys.readouterr().err
