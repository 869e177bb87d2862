"""The benchmarks print their tables, and write their figures."""

import csv
import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from devices import ELSEWHERE, TwoDevices
from harness_helpers import make_text_lm, write_rows
from helpers import make_vllm_model, save_pair
from transformers.utils import logging

from sekd.classes import CLASS_SELECTIONS
from sekd.losses import DIVERGENCES
from sekd.policies import POLICIES
from sekd.scores import SCORES

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_here(monkeypatch, capsys):
    """A function that runs a script in this process, and returns what it prints."""
    verbosity = logging.get_verbosity()
    monkeypatch.syspath_prepend(ROOT / "scripts")  # as python does for a script

    def run_here(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        capsys.readouterr()
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        return capsys.readouterr().out

    yield run_here
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture
def run(tmp_path, tokenizer, texts, run_here):
    """A function that runs a script on tiny models."""
    save_pair(tmp_path, tokenizer, texts)

    def run(script, *options, text=True):
        names = [tmp_path / "student", tmp_path / "teacher", *[tmp_path / "texts.jsonl"] * text]
        return run_here(script, *names, *options)

    return run


@pytest.fixture
def read(tmp_path):
    """A function that reads the figures that a script wrote, by name of the row."""

    def read(file):
        return {row["name"]: row["figures"] for row in json.loads((tmp_path / file).read_text())["rows"]}

    return read


def test_bench_table_compares_figures_with_aims(tmp_path, run_here):
    for file, name, figures in (
        ("step", "Full KD in chunks", {"of dense": 0.971, "above backbones, of dense": 0.12}),
        ("costs", "V: SE-KD", {"R² of seconds": 0.99}),
        ("costs_of_another_run", "B: SE-KD", {"R² of seconds": 1.0}),
    ):
        rows = [{"name": "another", "figures": {"of dense": 0.1}}, {"name": name, "figures": figures}]
        (tmp_path / f"{file}.json").write_text(json.dumps({"title": "a title", "rows": rows}))
    printed = run_here("bench_table.py", tmp_path)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "|" in line]
    reached = {figure: (aim, value, verdict) for figure, aim, value, verdict in cells}
    assert reached["Full KD in chunks / dense"] == ("≤ 0.97", "0.971", "no")
    assert reached["memory above backbones / dense, Full KD in chunks"] == ("≤ 0.12", "0.12", "yes")
    assert reached["R² of SE-KD's seconds as a line in V"] == ("≥ 0.99", "0.99", "yes")
    assert reached["R² of SE-KD's seconds as a line in B"] == ("≥ 0.99", "not measured", "")


@pytest.mark.slow
def test_bench_all_measures_what_is_named(tmp_path, run, read):
    run("bench_step.py", "--tokens", "16", "--rounds", "1", "--json", tmp_path / "out" / "peers.json", text=False)
    names = [tmp_path / name for name in ("student", "teacher", "texts.jsonl", "out")]
    command = ["bash", ROOT / "scripts" / "bench_all.sh", *names, "step", "3x"]
    (tmp_path / "texts.jsonl").unlink()  # so that bench_3x.py fails
    (tmp_path / "out" / "3x.json").write_text("figures of before")
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr[-2000:]
    assert done.stdout.splitlines()[:2] == ["step", "3x"]
    assert done.stdout.splitlines()[2].startswith(f"failed: {tmp_path / 'out' / '3x.log'}: ValueError: dataset_name ")
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {"peers.json", "step.json"}
    ratio = read("out/step.json")["Full KD in chunks"]["of dense"]
    assert f"| Full KD in chunks / dense                                | ≤ 0.97   | {ratio:.3g}" in done.stdout


def test_bench_all_knows_its_benchmarks():
    for arguments, message in (
        (["S", "T", "X", "out", "stp"], "no benchmark stp; the names are step peers"),
        ([], "OUT"),
    ):
        command = ["bash", str(ROOT / "scripts" / "bench_all.sh"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.slow
def test_bench_step(run, read, tmp_path):
    options = ["--tokens", "16", "--rounds", "1", "--fraction", "0.5", "--dtype", "float32"]
    printed = run("bench_step.py", *options, "--json", tmp_path / "step.json", text=False)
    assert "B 2, T 16, k 50 %, float32" in printed
    rows = read("step.json")
    assert [*rows] == [line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│")]
    assert rows["backbones only"]["of backbones"] == rows["Full KD, dense logits"]["of dense"] == 1
    assert rows["SE-KD, sampler's scores"]["peak MiB"] > rows["backbones only"]["peak MiB"]


@pytest.mark.slow
def test_bench_costs(run_here, read, tmp_path):
    sizes = ["--T", "8", "16", "--B", "2", "4", "--V", "200", "400", "--k", "20", "100", "--hidden", "64"]
    sizes += ["--base_T", "256", "--base_V", "256", "--layers", "1", "--teacher_layers", "1", "--rounds", "1"]
    printed = run_here("bench_costs.py", *sizes, "--output_dir", tmp_path, "--json", tmp_path / "costs.json")
    with (tmp_path / "costs.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 4 * 4 * 2, "axes, methods, values"
    dense = {int(row["value"]): float(row["mib"]) for row in rows if row["axis"] == "B" and "dense" in row["method"]}
    assert dense[4] == pytest.approx(2 * dense[2], rel=0.05), "logits of all sequences"
    growth = {name: figures["growth of memory"] for name, figures in read("costs.json").items()}
    assert growth["k: Full KD, dense logits"] == pytest.approx(1), "it has no k"
    assert f"SE-KD: memory above the backbones is {'' if growth['B: SE-KD'] <= 1.1 else 'not '}flat in B" in printed
    assert "seconds are a straight line in V (R² 1.000)" in printed, "through two points"
    assert (tmp_path / "costs.png").stat().st_size > 10_000
    assert (tmp_path / "costs.svg").read_text().count("of the positions") > 0


def run_process(script, *arguments):
    """What a script prints in a process of its own."""
    command = [sys.executable, ROOT / "scripts" / script, *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=environment, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_bench_peers(tmp_path, tokenizer, read):
    save_pair(tmp_path, tokenizer)
    options = ["--tokens", "24", "--rounds", "1", "--json", tmp_path / "peers.json"]
    printed = run_process("bench_peers.py", tmp_path / "student", tmp_path / "teacher", *options)
    figures = read("peers.json")
    assert all(name in printed for name in figures)
    selective, random, full, gkd, distillation = figures.values()
    assert {measured["targets"] for measured in figures.values()} == {2 * 2 * 23}
    assert full["first_loss"] == pytest.approx(gkd["first_loss"], rel=1e-5)
    assert full["first_loss"] == pytest.approx(distillation["first_loss"], rel=2e-3)
    assert selective["first_loss"] != random["first_loss"] != full["first_loss"]
    assert gkd["seconds_over_gkd"] == distillation["seconds_over_distillation"] == 1
    assert min(gkd["bytes_over_least"], distillation["bytes_over_least"]) == 1
    assert selective["seconds_over_gkd"] == selective["seconds"] / gkd["seconds"]


@pytest.mark.slow  # it imports TRL with vLLM
@pytest.mark.parametrize("changed", [{"targets": 9}, {"first_loss": 2.01}])
def test_bench_peers_compares_equal_work_alone(monkeypatch, changed):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = runpy.run_path(str(ROOT / "scripts" / "bench_peers.py"))
    figures = {name: {"targets": 10, "first_loss": 2.0} for name in script["CONTESTANTS"]}
    script["check"](figures)
    figures[script["GKD"]] |= changed
    with pytest.raises(SystemExit, match="TRL GKDTrainer"):
        script["check"](figures)


@pytest.mark.slow
def test_check_gpu_runs_without_a_gpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = ["bash", ROOT / "scripts" / "check_gpu.sh", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "check_gpu: PASS" in done.stdout
    machine, steps, runs, costs = json.loads((tmp_path / "check_gpu.json").read_text()).values()
    assert machine.startswith("cpu")
    chosen = [row["step"].split()[-1] for row in steps]
    assert {*chosen} >= {*POLICIES, *DIVERGENCES, *SCORES, *CLASS_SELECTIONS}
    assert [row["largest difference of a weight"] for row in runs] == ["0.0e+00"] * 2
    assert len(costs) == 12
    table = (tmp_path / "check_gpu.md").read_text().splitlines()
    assert [cell.strip() for cell in table[-1].split("|")[1:4]] == ["SE-KD_3X, from a cache", "32", "recomputed"]


def test_check_gpu_moves_all_to_the_device(tokenizer, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("check_gpu")
    with TwoDevices():
        rows = list(script.measure_steps(tokenizer, ELSEWHERE, is_tiny=True))
    assert len(rows) == 12


@pytest.mark.parametrize("difference", [2e-4, math.nan])
def test_check_gpu_fails_for_a_large_difference(tmp_path, monkeypatch, difference):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    report = importlib.import_module("check_gpu").Report(str(tmp_path), "a machine")
    report.check("steps", 1e-4, [{"step": "policy all", "loss": 0.0}])
    assert not report.failed
    report.check("steps", 1e-4, [{"step": "policy all", "loss": 0.0, "gradient": difference}])
    assert report.failed
    assert json.loads((tmp_path / "check_gpu.json").read_text())["steps"][0]["at most 1e-04"] == "FAIL"


@pytest.mark.slow
def test_bench_cache(run, read, tmp_path):
    options = ["--max_length", "32", "--sequences", "16", "--class_samples", "16", "--rounds", "1"]
    printed = run("bench_cache.py", *options, "--json", tmp_path / "cache.json")
    (line,) = (line for line in printed.splitlines() if "on disk, everything counted" in line)
    stored = float(line.split("│")[2].split()[0])
    assert 10 < stored < 100
    assert read("cache.json")["on disk, everything counted"]["bytes a position"] == pytest.approx(stored, abs=0.05)
    assert "time of build / of the bare forward" in printed


@pytest.mark.slow
def test_bench_3x_goes_on_where_it_stopped(run, read, tmp_path):
    options = ["--max_length", "32", "--sequences", "20", "--eval_samples", "4", "--class_samples", "16"]
    options += ["--output_dir", str(tmp_path / "bench"), "--batch", "4", "--seeds"]
    run("bench_3x.py", *options, "1")
    first = (tmp_path / "bench" / "1.json").stat().st_mtime_ns
    printed = run("bench_3x.py", *options, "1", "2", "--json", tmp_path / "3x.json")
    assert (tmp_path / "bench" / "1.json").stat().st_mtime_ns == first, "a finished seed was repeated"
    result = json.loads((tmp_path / "bench" / "2.json").read_text())
    assert result["seconds"].keys() == {"Full KD", "scoring", "construction", "cached training"}
    assert result["held out"]["SE-KD_3X"]["perplexity"] > 1
    assert "SE-KD_3X, cache reused" in printed
    figures = read("3x.json")
    assert figures["Full KD"]["of Full KD"] == 1
    assert figures["SE-KD_3X in all"]["seconds"] > figures["SE-KD_3X, cache reused"]["seconds"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_bench_rollouts(tmp_path, tokenizer, texts, read):
    save_pair(tmp_path, tokenizer, texts)
    for name in ("student", "teacher"):
        make_vllm_model().save_pretrained(tmp_path / name)
    names = [tmp_path / name for name in ("student", "teacher", "texts.jsonl")]
    options = ["--engines", "hf", "vllm", "--prompts", "1", "8", "--rounds", "1", "--steps", "3", "--enforce_eager"]
    # A process, since the script changes functions of sekd.
    options += ["--prompt_tokens", "4", "--new_tokens", "8", "--json", tmp_path / "rollouts.json"]
    printed = run_process("bench_rollouts.py", *names, *options)
    lines = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.startswith("│")}
    assert "(1.0x)" in lines["8"]
    assert lines["scoring"].rstrip("│ ").endswith("0.00 s (0%)"), "none with score_source: rollout"
    assert 0 < float(lines["selection_agreement"].split("│")[3]) <= 1
    figures = read("rollouts.json")
    assert figures.keys() == {"hf", "vllm", "exact", "rollout"}
    assert figures["vllm"]["of bare"] > 0 < figures["vllm"]["of bare, with log-probabilities"]


@pytest.mark.slow
def test_compare_lm_eval(tmp_path, run_here):
    pytest.importorskip("lm_eval")
    lm = make_text_lm()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    choices = {"text": ["one", "two of them"], "label": ["A", "B"]}
    rows = [{"question": f"Which is {i}?", "choices": choices, "answerKey": "AB"[i % 2]} for i in range(6)]
    write_rows(tmp_path / "arc_easy" / "test.jsonl", rows)
    options = ["--data-dir", tmp_path, "--tasks", "arc_easy", "--output", tmp_path / "out", "--limit", "5"]
    printed = run_here("compare_lm_eval.py", tmp_path / "model", *options)
    (line,) = (line for line in printed.splitlines() if line.startswith("│ arc_easy │ hf"))
    assert [cell.strip() for cell in line.split("│")[3:7]] == ["5", "0", "0.0e+00", "0"]
