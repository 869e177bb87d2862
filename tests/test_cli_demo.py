"""The demo's task, and the demo itself at a fraction of its size."""

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from sekd.cli.demo import pipeline
from sekd.cli.demo.word_problems import build_tokenizer, extract_answer, make_problems


def test_problems_are_repeatable_distinct_and_right():
    problems = make_problems(500, seed=3)
    assert problems == make_problems(500, seed=3)
    assert problems != make_problems(500, seed=4)
    assert len({p["question"] for p in problems}) == 500
    for problem in problems:
        *lines, last = problem["answer"].splitlines()
        assert 2 <= len(lines) <= 4
        for line in lines:
            sum_, result = line.split("<<")[1].split(">>")[0].split("=")
            assert eval(sum_) == int(result)
        assert last == f"#### {extract_answer(problem['answer'])}"
        assert lines[-1].split("=")[-1].startswith(f"{extract_answer(problem['answer'])}>>")


def test_the_tokenizer_round_trips(tmp_path):
    problems = make_problems(300, seed=0)
    build_tokenizer(problems).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) < 300
    for problem in problems:
        ids = tokenizer(problem["answer"])["input_ids"]
        assert tokenizer.decode(ids) == problem["answer"]
        whole = tokenizer(problem["question"] + "\n" + problem["answer"])["input_ids"]
        assert whole == tokenizer(problem["question"] + "\n")["input_ids"] + ids


def test_extract_answer():
    assert extract_answer("2 + 2\n#### 4<eos>") == "4"
    assert extract_answer("I do not know") is None


@pytest.mark.slow
def test_the_demo_runs_end_to_end(tmp_path, monkeypatch, capsys):
    """Its real size takes minutes; the path is the same."""
    monkeypatch.setattr(pipeline, "TEACHER", dict(hidden=64, layers=1, heads=1, steps=3))
    monkeypatch.setattr(pipeline, "STUDENT", dict(hidden=64, layers=1, heads=1, steps=2))
    monkeypatch.setattr(pipeline, "TRAIN", 200)
    monkeypatch.setattr(pipeline, "HELD_OUT", 20)
    torch.manual_seed(0)
    matches = pipeline.run_demo(str(tmp_path), seed=0, max_steps="3")
    assert [*matches] == ["teacher", "student before", "student after SE-KD 20 %", "student after Full KD"]
    for folder, policy in (("sekd", "top_k"), ("full_kd", "all")):
        assert yaml.safe_load((tmp_path / folder / "recipe.yaml").read_text())["position_policy"] == policy
    page = (tmp_path / "report.html").read_text()
    assert "SE-KD 20 %" in page
    assert f"{matches['student after Full KD']:.1f}" in page
    out = capsys.readouterr().out
    assert "report.html" in out
    assert "exact match on 20 held-out problems" in out
    for label in matches:
        assert label in out
