"""The cache: the same bytes however it was built, the live teacher's loss."""

import json
import shutil

import pytest
import torch
from cache_helpers import SETTINGS, config, make_cache
from helpers import ONE_SGD_STEP, VOCAB, make_model, make_trainer, save_pair, trained_weights

from sekd.cache.build import build_cache
from sekd.cache.readers import LocalReader, draw_uniforms
from sekd.cache.store import Store
from sekd.cache.teacher import CachedTeacher
from sekd.classes import CLASS_SELECTIONS, classes_at
from sekd.cli import main
from sekd.data.batch import Sample, collate
from sekd.data.prepare import prepare
from sekd.distill import Method, distill
from sekd.fingerprints import sample_key
from sekd.losses import DIVERGENCES
from sekd.models import freeze
from sekd.policies import make_policy
from sekd.scores import make_scoring
from sekd.teachers.live import LiveTeacher
from sekd.types import Batch


@pytest.fixture(params=["pairs", "texts"])
def rows(request):
    return request.getfixturevalue(request.param)


def test_every_sample_is_what_the_teacher_draws(tmp_path, tokenizer, rows):
    store = make_cache(tmp_path / "cache", tokenizer, rows)
    teacher = make_model("untied", 1)
    args = config(tmp_path)
    for row in prepare(rows, tokenizer, args):
        logits, start = [], 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            where = [t for t in range(length - 1) if row["supervised"][start + t + 1]]
            with torch.no_grad():
                logits.append(
                    teacher(input_ids=torch.tensor([row["input_ids"][start : start + length]])).logits[0][where]
                )
            start += length
        p = torch.cat(logits).softmax(-1)
        target = classes_at(p, draw_uniforms(sample_key(row), args.seed, len(p), 16))
        expected = torch.zeros(len(p), VOCAB).scatter_add_(1, target.ids, target.probs * 16)
        ids, counts, _ = store.read(sample_key(row))
        found = torch.zeros(len(p), VOCAB).scatter_add_(1, torch.tensor(ids), torch.tensor(counts).float())
        torch.testing.assert_close(found, expected)


def test_the_bytes_of_a_sample_depend_on_nothing_else(tmp_path, tokenizer, rows):
    """Not on its neighbours, its place, or the size of a shard."""
    first = make_cache(tmp_path / "first", tokenizer, rows)
    other = make_cache(tmp_path / "other", tokenizer, rows, order=lambda n: range(n - 1, -1, -1), shard_samples=3)
    assert first.places.keys() == other.places.keys()
    for key, (number, place) in first.places.items():
        there = other.places[key]
        data = first.shards[number].column("data")[place].as_py()
        assert data == other.shards[there[0]].column("data")[there[1]].as_py()
    assert first.fingerprint["data"] == other.fingerprint["data"], "the order of samples is not part of the data's name"


def test_repeated_samples_are_kept_once(tmp_path, tokenizer, pairs):
    store = make_cache(tmp_path / "cache", tokenizer, pairs.select([0, 1, 0, 2, 1]))
    assert len(store.places) == sum(shard["samples"] for shard in store.manifest["shards"]) == 3


def test_the_manifest_has_the_seconds_of_a_whole_build(tmp_path, tokenizer, pairs):
    seconds = make_cache(tmp_path / "cache", tokenizer, pairs).manifest["seconds"]
    assert seconds > 0
    assert make_cache(tmp_path / "cache", tokenizer, pairs).manifest["seconds"] == seconds, "nothing was read again"
    for shard in (tmp_path / "cache").glob("shard-0000[1-7].arrow"):
        shard.unlink()
    again = make_cache(tmp_path / "cache", tokenizer, pairs).manifest["seconds"]
    assert 0 < again != seconds
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest | {"seconds": "soon"}))
    with pytest.raises(ValueError, match="seconds is 'soon'"):
        Store(str(tmp_path / "cache"))


def test_training_from_the_cache_is_training_from_the_teacher(tmp_path, tokenizer, pairs, monkeypatch):
    data = pairs.select(range(8))
    settings = SETTINGS | ONE_SGD_STEP | dict(per_device_train_batch_size=8)
    make_cache(tmp_path / "cache", tokenizer, data)
    cached = make_trainer(tmp_path / "a", tokenizer, data, teacher_cache=str(tmp_path / "cache"), **settings)
    assert not hasattr(cached.teacher, "model"), "no teacher is in memory"
    assert cached.args.class_selection == "rs_kd"
    ours = trained_weights(cached)

    live = make_trainer(tmp_path / "b", tokenizer, data, class_selection="rs_kd", **settings)
    keys = {row["sample_id"]: sample_key(row) for row in live.train_dataset}
    from sekd import distill as module

    def draws_of_the_cache(counts, generator, dtype=None):
        batch = module_batch[0]
        parts = []
        for sample, chosen in zip(batch.sample_ids.tolist(), chosen_rows(live, batch), strict=True):
            parts.append(draw_uniforms(keys[sample], live.args.seed, len(chosen), 16)[chosen].flatten())
        return torch.cat(parts)

    module_batch = []
    original = module.hidden_states
    monkeypatch.setattr(module, "hidden_states", lambda m, b: module_batch.append(b) or original(m, b))
    monkeypatch.setattr(module, "uniform", draws_of_the_cache)
    theirs = trained_weights(live)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert cached.state.log_history[0]["loss"] == pytest.approx(live.state.log_history[0]["loss"], rel=1e-5)


@pytest.mark.slow
def test_in_expectation_the_gradient_is_that_of_forward_kl(tmp_path, tokenizer, pairs):
    """The mean over 400 caches of other seeds lies within 5 standard errors of the dense gradient, everywhere."""
    data = pairs.select(range(3))
    dataset = prepare(data, tokenizer, config(tmp_path))
    batch = Batch(**collate([Sample(**row) for row in dataset], 122))
    keys = {row["sample_id"]: sample_key(row) for row in dataset}
    student, teacher = make_model("untied"), freeze(make_model("untied", 1))
    policy = make_policy("top_k", 0.5)

    def gradient(source, **choices):
        method = Method(make_scoring("student_entropy"), policy, DIVERGENCES["forward_kl"], **choices)
        student.zero_grad()
        distill(student, source, batch, method)[0].backward()
        return student.lm_head.weight.grad.double().clone()

    dense, found = gradient(LiveTeacher(teacher)), []
    for seed in range(400):
        args = config(tmp_path / "run", seed=seed)
        folder = str(tmp_path / f"cache{seed}")
        store = build_cache(dataset, LocalReader(teacher, VOCAB, args), tokenizer, args, folder)
        found.append(gradient(CachedTeacher(store, keys), classes=CLASS_SELECTIONS["rs_kd"], class_samples=16))
    found = torch.stack(found)
    error = (found.mean(0) - dense).abs()
    noise = found.std(0) / len(found) ** 0.5
    assert (error <= 5 * noise + 1e-7).all()
    assert noise.max() < 0.05 * dense.abs().max(), "the test would see a bias of a quarter"


def chosen_rows(trainer, batch):
    """Which valid rows of each sequence the student's entropy chooses."""
    with torch.no_grad():
        q = trainer.model(input_ids=batch.input_ids).logits.log_softmax(-1)
    entropy = -(q.exp() * q).sum(-1)
    weights = trainer.method.policy(entropy, batch.valid)
    return [(w > 0)[v] for w, v in zip(weights, batch.valid, strict=True)]


def test_an_on_policy_recipe_builds_a_cache(recipe, tmp_path):
    flags = ["--lmbda", "1", "--divergence", "reverse_kl", "--rollouts_per_prompt", "2"]
    assert main(["cache", "build", recipe, "--output", str(tmp_path / "on"), *flags]) == 0
    assert main(["cache", "build", recipe, "--output", str(tmp_path / "off")]) == 0
    on, off = (Store(str(tmp_path / name)) for name in ("on", "off"))
    assert on.fingerprint == off.fingerprint


def test_build_info_verify_and_train(tmp_path, tokenizer, texts, capsys):
    import yaml

    save_pair(tmp_path, tokenizer, texts)
    keys = dict(output_dir=str(tmp_path / "run"), model_name_or_path=str(tmp_path / "student"), rollout_engine="hf")
    keys |= dict(teacher_model_name_or_path=str(tmp_path / "teacher"), dataset_name=str(tmp_path / "texts.jsonl"))
    keys |= dict(max_length=40, max_steps=6, sample_fraction=0.5, report_to="none", save_strategy="no", logging_steps=3)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    recipe, folder = str(tmp_path / "recipe.yaml"), str(tmp_path / "cache")
    assert main(["cache", "build", recipe, "--output", folder]) == 0
    assert main(["cache", "info", folder]) == 0
    shown = capsys.readouterr().out
    assert "bytes a position" in shown
    assert "of 64 draws, 128 in the vocabulary" in shown
    assert main(["cache", "verify", folder]) == 0
    assert main(["cache", "build", recipe]) == 2
    assert "there is no folder for the cache: add --output DIR" in capsys.readouterr().err
    shutil.move(tmp_path / "teacher", tmp_path / "gone")  # nobody needs it any more
    assert main(["train", recipe, "--teacher_cache", folder]) == 0
    other = ["--teacher_dtype", "float16", "--overwrite_output_dir", "true"]  # on no hardware the default
    assert main(["train", recipe, "--teacher_cache", folder, *other]) == 2
    assert "the recipe has teacher_dtype float16" in capsys.readouterr().err
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert logs[0]["selected_fraction"] < 0.3
    assert main(["cache", "info", str(tmp_path)]) == 2
