"""The study in docs/results.md: its tables are what its files say, and its scripts measure what they claim."""

import csv
import importlib
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from helpers import save_pair

from sekd.data.batch import collate
from sekd.sweep.file import read_sweep
from sekd.types import Batch

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs" / "data"


@pytest.fixture
def script(monkeypatch):
    """A function that imports a script."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def list_studies():
    tables = [path for path in DATA.glob("*.csv") if path.read_text().startswith("method,point,score,mean,")]
    return sorted(path.stem for path in tables)


def list_grids():
    return [name for name in list_studies() if (DATA / f"{name}_grid.csv").exists()]


def test_the_tables_of_the_page_are_those_of_the_files(script):
    results = script("study_results")
    page = (ROOT / "docs" / "results.md").read_text()
    assert results.fill_tables(page) == page
    assert {*results.REGIMES} == {*list_studies()}
    for name in results.REGIMES:
        assert f"<!-- table {name} -->" in page


@pytest.mark.parametrize("name", list_studies())
def test_means_and_differences_follow_from_the_values_of_the_seeds(name):
    rows = read(DATA / f"{name}.csv")
    values = {(row["method"], row["score"]): [float(v) for v in row["values"].split() if v != "-"] for row in rows}
    for row in rows:
        own = values[row["method"], row["score"]]
        assert len(own) == int(row["seeds"])
        assert float(row["mean"]) == pytest.approx(statistics.fmean(own))
        if len(own) > 1:
            assert float(row["deviation"]) == pytest.approx(statistics.stdev(own))
        for column, other in (("baseline", "Full KD"), ("random", "RandomPos 20%")):
            if row[f"difference_to_{column}"]:
                pairs = zip(own, values[other, row["score"]], strict=False)
                assert float(row[f"difference_to_{column}"]) == pytest.approx(
                    statistics.fmean(a - b for a, b in pairs), abs=1e-9
                )
                over_seeds = [a - b for a, b in zip(own, values[other, row["score"]], strict=False)]
                if row[f"stderr_to_{column}"] and len(own) > 1:  # seeds alone cannot make a larger error than all
                    least = statistics.stdev(over_seeds) / math.sqrt(len(over_seeds))
                    assert float(row[f"stderr_to_{column}"]) >= least - 1e-9


@pytest.mark.parametrize("name", list_grids())
def test_the_chosen_points_are_the_best_ones_of_the_grid(name):
    grid = read(DATA / f"{name}_grid.csv")
    chosen = {row["method"]: row["point"] for row in read(DATA / f"{name}.csv") if row["point"]}
    sign = -1 if "kl" in grid[0]["score"] else 1
    for method in {row["method"] for row in grid}:
        points = {
            row["point"]: sign * statistics.fmean(map(float, row["values"].split()))
            for row in grid
            if row["method"] == method
        }
        assert len(points) >= 3
        assert points[chosen[method]] == max(points.values())


def test_equal_seconds_lie_on_the_line_between_runs_of_full_kd(script):
    results = script("study_results")

    def make(name, values, seconds):
        return results.Method(name, "", {}, values, 10, seconds / 10, seconds)

    methods = {
        m.name: m
        for m in (
            make("Full KD", [10.0, 20.0], 100.0),
            make("Full KD, 7 steps", [6.0, 10.0], 70.0),
            make("SE-KD 20%", [9.0, 18.0], 85.0),
            make("AT-KD", [9.0, 16.0], 101.0),
        )
    }
    assert results.at_seconds(methods, 85.0) == [8.0, 15.0]
    mean, error = results.compare_at_equal_seconds(methods, methods["SE-KD 20%"])
    assert (mean, error) == pytest.approx((2.0, 1.0))
    assert results.compare_at_equal_seconds(methods, methods["AT-KD"]) is None


@pytest.fixture
def sweep(tmp_path, tokenizer, texts):
    save_pair(tmp_path, tokenizer, texts)
    recipe = {
        **{"dataset_name": f"{tmp_path}/texts.jsonl", "output_dir": "x", "report_to": "none", "max_length": 32},
        **{"model_name_or_path": f"{tmp_path}/student", "teacher_model_name_or_path": f"{tmp_path}/teacher"},
        **{"dataset_train_split": "train[8:]", "dataset_test_split": "train[:8]", "teacher_dtype": "float32"},
        **{"per_device_train_batch_size": 4, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 4},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    methods = {
        "Full KD": {"position_policy": "all"},
        "SE-KD 20%": {},
        "RandomPos 20%": {"position_policy": "random"},
        "Half": {"position_fraction": 0.5},
    }
    content = {"recipe": "recipe.yaml", "output_dir": f"{tmp_path}/sweep", "seeds": [0], "methods": methods}
    (tmp_path / "sweep.yaml").write_text(json.dumps(content))
    return read_sweep(str(tmp_path / "sweep.yaml"))


def test_gradients_are_those_of_the_written_out_losses(script, sweep):
    explain = script("explain_selection")
    rows = {row[0]: row[1:] for row in explain.measure_gradients(sweep, sweep.methods, batches=1, others=2)}
    cosine, to_mean, length, norm, kl_share, overlap, fraction = rows["Full KD"]
    assert [cosine, norm, kl_share, overlap, fraction] == pytest.approx([1.0] * 5, abs=1e-5)
    assert 0 < to_mean < 1
    assert rows["SE-KD 20%"][5] == rows["Half"][5] == 1.0
    assert rows["SE-KD 20%"][6] < rows["Half"][6] < 0.6
    assert rows["SE-KD 20%"][4] < rows["Half"][4] < 1
    assert rows["RandomPos 20%"][5] < 1

    # The same batch, with all logits, in float64.
    trainer = explain.load_run(sweep.runs[0])
    samples = trainer.data_collator(list(trainer.train_dataset.shuffle(seed=0).take(4)))
    batch = Batch(**collate(samples, trainer.pad_token_id))
    student, teacher = trainer.model.double(), trainer.teacher.model.double()
    ids = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    q = student(**ids, use_cache=False).logits.log_softmax(-1)
    p = teacher(**ids, use_cache=False).logits[..., : q.shape[-1]].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    entropy = -(q.exp() * q).sum(-1)
    gradients, shares = [], []
    for share in (1.0, 0.2):
        losses, chosen = [], torch.zeros_like(batch.valid)
        for b in range(len(kl)):
            places = batch.valid[b].nonzero()[:, 0]
            best = places[entropy[b, places].topk(math.ceil(round(share * len(places), 9))).indices]
            chosen[b, best] = True
            losses.append(kl[b, best].mean())
        gradients.append(
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(sum(losses) / 4, student.parameters(), retain_graph=True)]
            )
        )
        shares.append(float((kl.detach() * chosen).sum() / (kl.detach() * batch.valid).sum()))
    full, selective = gradients
    assert rows["SE-KD 20%"][0] == pytest.approx(float(torch.cosine_similarity(full, selective, dim=0)), abs=1e-4)
    assert length == pytest.approx(float(full.norm()), rel=1e-4)
    assert rows["SE-KD 20%"][2] == pytest.approx(float(selective.norm()), rel=1e-4)
    assert rows["SE-KD 20%"][3] == pytest.approx(float(selective.norm() / full.norm()), rel=1e-4)
    assert rows["SE-KD 20%"][4] == pytest.approx(shares[1], rel=1e-4)


def test_uncertain_and_other_positions_together_are_the_held_out_means(script, sweep):
    explain = script("explain_selection")
    ((name, *values),) = explain.measure_students(sweep, [])
    assert name == "Student before"
    trainer = explain.load_run(sweep.runs[0])
    metrics = trainer.evaluate()
    batches = [Batch.from_inputs(inputs) for inputs in explain.make_batches(trainer, trainer.eval_dataset)]
    share = float(torch.cat([explain.choose_by_entropy(trainer, batch) for batch in batches]).float().mean())
    for i, score in enumerate(explain.NAMES):
        mean = share * values[i] + (1 - share) * values[i + 3]
        assert mean == pytest.approx(metrics[f"eval_{score}"], rel=1e-4)
    assert values[2] > values[5]
