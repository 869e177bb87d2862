"""The study runs, resumes where it stopped, and refuses to mix settings."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture
def study(tmp_path, tokenizer, texts):
    pytest.importorskip("matplotlib", reason="the tables' plot needs the extra `report`")
    for name, seed in (("student", 0), ("teacher", 1)):
        make_model("untied", seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    texts.to_json(tmp_path / "text.jsonl")

    def run(*options):
        command = [sys.executable, str(ROOT / "scripts" / "study_selection.py")]
        command += [str(tmp_path / part) for part in ("student", "teacher", "text.jsonl")]
        command += ["--output_dir", str(tmp_path / "study"), "--max_length", "32", "--eval_samples", "4", *options]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)

    return tmp_path / "study", run


def test_the_study_resumes_and_writes_its_tables(study):
    folder, run = study
    some = ["--steps", "2", "--seeds", "1", "2", "--methods", "Full KD", "KL", "GLS"]
    assert run(*some[:5], "--methods", "Full KD").returncode == 0
    first = (folder / "full_kd_1.json").stat().st_mtime_ns
    done = run(*some)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "full_kd_1.json").stat().st_mtime_ns == first, "a finished run was repeated"
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["method"] for row in rows] == ["Student, not distilled", *(["Full KD"] * 2), "KL", "KL", "GLS", "GLS"]
    result = json.loads((folder / "kl_2.json").read_text())
    assert result["perplexity"] > 1
    assert 0 <= result["ece"] <= 1
    assert "| KL |" in (folder / "tables.md").read_text()
    assert (folder / "results.png").stat().st_size > 5000

    other = run("--steps", "3", "--seeds", "1", "--methods", "Full KD")
    assert other.returncode != 0
    assert "is of a study with other settings (before, now): {'steps': (2, 3)}" in other.stderr
