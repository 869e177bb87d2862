"""The benchmarks print their tables."""

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


pytestmark = pytest.mark.slow


@pytest.fixture
def run_here(monkeypatch, capsys):
    """A function that runs a script in this process, and returns what it prints."""
    verbosity = logging.get_verbosity()

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


def test_bench_step(run):
    printed = run("bench_step.py", "--tokens", "16", "--rounds", "1", text=False)
    assert "SE-KD 20%" in printed
    assert "Full KD, dense logits" in printed


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


def test_bench_cache(run):
    printed = run("bench_cache.py", "--max_length", "32", "--sequences", "16", "--class_samples", "16", "--rounds", "1")
    (line,) = (line for line in printed.splitlines() if "on disk, everything counted" in line)
    stored = float(line.split("│")[2].split()[0])
    assert 10 < stored < 100
    assert "build over the bare forward" in printed


def test_bench_3x_goes_on_where_it_stopped(run, tmp_path):
    options = ["--max_length", "32", "--sequences", "20", "--eval_samples", "4", "--class_samples", "16"]
    options += ["--output_dir", str(tmp_path / "bench"), "--batch", "4", "--seeds"]
    run("bench_3x.py", *options, "1")
    first = (tmp_path / "bench" / "1.json").stat().st_mtime_ns
    printed = run("bench_3x.py", *options, "1", "2")
    assert (tmp_path / "bench" / "1.json").stat().st_mtime_ns == first, "a finished seed was repeated"
    result = json.loads((tmp_path / "bench" / "2.json").read_text())
    assert result["seconds"].keys() == {"Full KD", "scoring", "construction", "cached training"}
    assert result["held out"]["SE-KD_3X"]["perplexity"] > 1
    assert "SE-KD_3X, cache reused" in printed


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_bench_rollouts(tmp_path, tokenizer, texts):
    save_pair(tmp_path, tokenizer, texts)
    for name in ("student", "teacher"):
        make_vllm_model().save_pretrained(tmp_path / name)
    names = [tmp_path / name for name in ("student", "teacher", "texts.jsonl")]
    options = ["--engines", "hf", "vllm", "--prompts", "1", "8", "--rounds", "1", "--steps", "3", "--enforce_eager"]
    # A process, since the script changes functions of sekd.
    command = [sys.executable, ROOT / "scripts" / "bench_rollouts.py", *names, *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [*map(str, command), "--prompt_tokens", "4", "--new_tokens", "8"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed = done.stdout
    lines = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.startswith("│")}
    assert "(1.0x)" in lines["8"]
    assert lines["scoring"].rstrip("│ ").endswith("0.00 s (0%)"), "none with score_source: rollout"
    assert 0 < float(lines["selection_agreement"].split("│")[3]) <= 1


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
