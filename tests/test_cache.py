"""The cache: the same bytes however it was built, the live teacher's loss, and no damage goes unnoticed."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import VOCAB, make_model
from test_trainer import ONE_SGD_STEP, make_trainer, trained_weights

from sekd import SEKDConfig
from sekd.cache.build import build_cache
from sekd.cache.readers import LocalReader, sample_draws
from sekd.cache.store import MANIFEST, Store, key_of, locked, verify
from sekd.classes import classes_at
from sekd.cli import main
from sekd.data import Sample, collate, prepare
from sekd.distill import Method, distill
from sekd.losses import forward_kl
from sekd.models import freeze
from sekd.policies import make_policy
from sekd.scores import make_scoring
from sekd.teachers import CachedTeacher, LiveTeacher
from sekd.types import Batch

SETTINGS = dict(max_length=40, max_prompt_length=20, class_samples=16)


def config(folder, **choices):
    return SEKDConfig(output_dir=str(folder), bf16=False, disable_tqdm=True, **SETTINGS | choices)


def make_cache(folder, tokenizer, rows, seed=1, order=None, shard_samples=8, **choices):
    args = config(f"{folder}.run", **choices)
    dataset = prepare(rows, tokenizer, args)
    if order is not None:
        dataset = dataset.select(order(len(dataset)))
    reader = LocalReader(freeze(make_model("untied", seed)), VOCAB, args)
    return build_cache(dataset, reader, tokenizer, args, str(folder), shard_samples)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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
        target = classes_at(p, sample_draws(key_of(row), args.seed, len(p), 16))
        expected = torch.zeros(len(p), VOCAB).scatter_add_(1, target.ids, target.probs * 16)
        ids, counts, _ = store.read(key_of(row))
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


def test_training_from_the_cache_is_training_from_the_teacher(tmp_path, tokenizer, pairs, monkeypatch):
    data = pairs.select(range(8))
    settings = SETTINGS | ONE_SGD_STEP | dict(per_device_train_batch_size=8)
    make_cache(tmp_path / "cache", tokenizer, data)
    cached = make_trainer(tmp_path / "a", tokenizer, data, teacher_cache=str(tmp_path / "cache"), **settings)
    assert not hasattr(cached.teacher, "model"), "no teacher is in memory"
    assert cached.args.class_selection == "rs_kd"
    ours = trained_weights(cached)

    live = make_trainer(tmp_path / "b", tokenizer, data, class_selection="rs_kd", **settings)
    keys = {row["sample_id"]: key_of(row) for row in live.train_dataset}
    from sekd import distill as module

    def draws_of_the_cache(counts, generator, dtype=None):
        batch = module_batch[0]
        parts = []
        for sample, chosen in zip(batch.sample_ids.tolist(), chosen_rows(live, batch), strict=True):
            parts.append(sample_draws(keys[sample], live.args.seed, len(chosen), 16)[chosen].flatten())
        return torch.cat(parts)

    module_batch = []
    original = module.hidden_states
    monkeypatch.setattr(module, "hidden_states", lambda m, b: module_batch.append(b) or original(m, b))
    monkeypatch.setattr(module, "uniform", draws_of_the_cache)
    theirs = trained_weights(live)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert cached.state.log_history[0]["loss"] == pytest.approx(live.state.log_history[0]["loss"], rel=1e-5)


def test_in_expectation_the_gradient_is_that_of_forward_kl(tmp_path, tokenizer, pairs):
    """The mean over 400 caches of other seeds lies within 5 standard errors of the dense gradient, everywhere."""
    data = pairs.select(range(3))
    dataset = prepare(data, tokenizer, config(tmp_path))
    batch = Batch(**collate([Sample(**row) for row in dataset], 122))
    keys = {row["sample_id"]: key_of(row) for row in dataset}
    student, teacher = make_model("untied"), freeze(make_model("untied", 1))
    policy = make_policy("top_k", 0.5)

    def gradient(source, **choices):
        method = Method(make_scoring("student_entropy"), policy, forward_kl, **choices)
        student.zero_grad()
        distill(student, source, batch, method)[0].backward()
        return student.lm_head.weight.grad.double().clone()

    dense, found = gradient(LiveTeacher(teacher)), []
    for seed in range(400):
        args = config(tmp_path / "run", seed=seed)
        folder = str(tmp_path / f"cache{seed}")
        store = build_cache(dataset, LocalReader(teacher, VOCAB, args), tokenizer, args, folder)
        found.append(gradient(CachedTeacher(store, keys), class_selection="rs_kd", class_samples=16))
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


# Faults


def test_kill_9_at_random_moments_loses_and_changes_nothing(tmp_path, tokenizer, texts):
    """30 kills of a build, each at a random moment; then it is finished, and bit-identical to an undisturbed one."""
    torch.set_num_threads(1)  # a forked child must not wait for its parent's threads
    args = config(tmp_path / "run")
    dataset, reader = prepare(texts, tokenizer, args), LocalReader(freeze(make_model("untied", 1)), VOCAB, args)

    def build(name):
        build_cache(dataset, reader, tokenizer, args, str(tmp_path / name), shard_samples=1)

    started = time.monotonic()
    build("whole")
    seconds = time.monotonic() - started
    context, generator, progress = multiprocessing.get_context("fork"), random.Random(0), []
    for _ in range(30):
        child = context.Process(target=build, args=("cut",))
        child.start()
        time.sleep(generator.random() * seconds / 4)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        progress.append(len(list((tmp_path / "cut").glob("shard-*.arrow"))))
    assert progress == sorted(progress), "a finished shard was lost"
    assert len(set(progress)) > 3, f"the kills must fall into the build: {progress}"
    build("cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_two_builders_in_one_folder(tmp_path, tokenizer, pairs):
    with locked(str(tmp_path / "cache")), pytest.raises(ValueError, match="another process builds the cache in"):
        make_cache(tmp_path / "cache", tokenizer, pairs)
    make_cache(tmp_path / "cache", tokenizer, pairs)


def test_the_lock_does_not_claim_the_errors_of_others(tmp_path):
    with pytest.raises(BlockingIOError, match="of another file"), locked(str(tmp_path)):
        raise BlockingIOError("of another file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seed=2), "another value of teacher_model_name_or_path, its revision or weights"),
        (dict(class_samples=8), r"another value of class_samples \(16, now 8\)"),
        (dict(max_length=39), "another value of the data|another value of max_length"),
        (dict(kd_temperature=2.0), r"another value of kd_temperature \(1.0, now 2.0\)"),
        (dict(shard_samples=4), "another value of the samples of a shard"),
    ],
)
def test_a_build_does_not_go_on_with_another_cache(tmp_path, tokenizer, texts, change, message):
    make_cache(tmp_path / "cache", tokenizer, texts)
    before = contents(tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        make_cache(tmp_path / "cache", tokenizer, texts, **change)
    assert contents(tmp_path / "cache") == before


def damage_truncate(folder):
    path = folder / "shard-00001.arrow"
    path.write_bytes(path.read_bytes()[:-100])


def damage_flip(folder):
    path = folder / "shard-00001.arrow"
    store = Store(str(folder))
    data = path.read_bytes()
    # In the middle of a sample's bytes, where Arrow itself notices nothing.
    place = data.index(store.shards[1].column("data")[0].as_py()) + 30
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


def damage_remove(folder):
    (folder / "shard-00001.arrow").unlink()


def damage_format(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))


def damage_incomplete(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"complete": False}))


def damage_manifest(folder):
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, r"shard-00001.arrow' has \d+ bytes instead of \d+; delete it and build \(or pull\) again"),
        (damage_remove, "shard-00001.arrow' is missing; build \(or pull\) the cache again, the others stay"),
        (damage_format, "has format 99, and this version of sekd reads 2; install the version that wrote it"),
        (damage_incomplete, "is not complete; run its `sekd cache build` again, it goes on"),
        (damage_manifest, "holds no manifest.json; build it with `sekd cache build RECIPE`"),
    ],
)
def test_damage_is_named_when_a_cache_is_opened(tmp_path, tokenizer, pairs, damage, message):
    make_cache(tmp_path / "cache", tokenizer, pairs)
    damage(tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        make_trainer(
            tmp_path, tokenizer, pairs, teacher_cache=str(tmp_path / "cache"), **SETTINGS | dict(disable_tqdm=True)
        )


def test_a_flipped_bit_is_never_trained_on(tmp_path, tokenizer, pairs, capsys):
    store = make_cache(tmp_path / "cache", tokenizer, pairs)
    assert not verify(store.folder)
    damage_flip(tmp_path / "cache")
    damaged = Store(str(tmp_path / "cache"))
    (problem,) = verify(damaged.folder)
    assert problem == "shard-00001.arrow: the checksum differs; delete it and build (or pull) again"
    (key,) = [key for key, place in damaged.places.items() if place == (1, 0)]
    with pytest.raises(ValueError, match=r"shard-00001.arrow', sample 0: the bytes are damaged: their checksum"):
        damaged.read(key)
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 2
    assert "shard-00001.arrow: the checksum differs" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [damage_truncate, damage_remove, damage_flip])
def test_a_broken_shard_is_built_again_as_it_was(tmp_path, tokenizer, pairs, damage):
    make_cache(tmp_path / "cache", tokenizer, pairs)
    before = contents(tmp_path / "cache")
    damage(tmp_path / "cache")
    make_cache(tmp_path / "cache", tokenizer, pairs)
    assert contents(tmp_path / "cache") == before


STRANGE = {
    "a list": lambda m: [1],
    "of another program": lambda m: {"files": []},
    "without fields": lambda m: {"format": m["format"]},
    "an empty fingerprint": lambda m: m | {"fingerprint": {}},
    "a vocabulary in words": lambda m: m | {"fingerprint": m["fingerprint"] | {"vocab": "x"}},
    "an unknown form": lambda m: m | {"fingerprint": m["fingerprint"] | {"form": "zip"}},
    "a shard elsewhere": lambda m: m | {"shards": [m["shards"][0] | {"file": "../x.arrow"}]},
    "no checksum": lambda m: m | {"shards": [{k: v for k, v in s.items() if k != "sha256"} for s in m["shards"]]},
}


@pytest.mark.parametrize("strange", STRANGE)
def test_a_strange_manifest_is_refused_in_one_line(tmp_path, tokenizer, pairs, capsys, strange):
    make_cache(tmp_path / "cache", tokenizer, pairs)
    manifest = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    (tmp_path / "cache" / MANIFEST).write_text(json.dumps(STRANGE[strange](manifest)))
    capsys.readouterr()
    for command in ("info", "verify"):
        assert main(["cache", command, str(tmp_path / "cache")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "manifest.json" in line
    with pytest.raises(ValueError, match=r"manifest\.json"):
        make_cache(tmp_path / "cache", tokenizer, pairs)


def test_verify_names_every_broken_shard_and_missing_samples(tmp_path, tokenizer, pairs, capsys):
    folder = tmp_path / "cache"
    make_cache(folder, tokenizer, pairs)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"shards": manifest["shards"][:-1]}))
    assert verify(str(folder)) == [
        "manifest.json: it lists other samples than it was built from; build (or pull) again"
    ]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    damage_truncate(folder)
    (folder / "shard-00003.arrow").unlink()
    first, second = verify(str(folder))
    assert "shard-00001.arrow" in first
    assert "shard-00003.arrow' is missing" in second


def test_a_teacher_that_is_not_finite_stops_the_build_with_the_sample(tmp_path, tokenizer, pairs):
    args = config(tmp_path)
    dataset, teacher = prepare(pairs, tokenizer, args), make_model("untied", 1)
    token = dataset[5]["input_ids"][0]
    with torch.no_grad():
        teacher.model.embed_tokens.weight[token] = float("nan")
    first = next(row["sample_id"] for row in dataset if token in row["input_ids"][:-1])
    reader = LocalReader(teacher, VOCAB, args)
    with pytest.raises(FloatingPointError, match=rf"not finite at some position of sample {first}; look at it"):
        build_cache(dataset, reader, tokenizer, args, str(tmp_path / "cache"))
    trainer = make_trainer(tmp_path, tokenizer, pairs, None, teacher, class_selection="rs_kd", max_steps=8)
    with pytest.raises(FloatingPointError, match=r"teacher's distribution is not finite .* of samples \["):
        trainer.train()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(max_length=39), r"another value of max_length \(40, the recipe has 39\)"),
        (dict(class_samples=8), r"another value of class_samples \(16, the recipe has 8\)"),
        (dict(kd_temperature=2.0), r"another value of kd_temperature"),
        (dict(teacher_model_name_or_path="other"), "is of teacher None, revision main; the recipe names 'other'"),
    ],
)
def test_a_cache_of_another_recipe_is_refused(tmp_path, tokenizer, pairs, choices, message):
    make_cache(tmp_path / "cache", tokenizer, pairs)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, pairs, teacher_cache=str(tmp_path / "cache"), **SETTINGS | choices)


def test_samples_that_are_not_in_the_cache(tmp_path, tokenizer, pairs):
    make_cache(tmp_path / "cache", tokenizer, pairs.select(range(10)))
    with pytest.raises(ValueError, match=r"lacks 54 of the 64 samples, the first is sample 10; build it with"):
        make_trainer(tmp_path, tokenizer, pairs, teacher_cache=str(tmp_path / "cache"), **SETTINGS)


def test_another_tokenizer_and_a_smaller_head_are_refused(tmp_path, tokenizer, pairs):
    from conftest import make_tokenizer

    make_cache(tmp_path / "cache", tokenizer, pairs)
    other = make_tokenizer()
    other.chat_template = None
    with pytest.raises(ValueError, match="another value of the tokenizer or its chat template"):
        make_trainer(tmp_path, other, pairs, teacher_cache=str(tmp_path / "cache"), **SETTINGS)
    small = make_model("untied")
    small.resize_token_embeddings(126)
    with pytest.raises(ValueError, match="has 128 classes, and the student's head only 126"):
        make_trainer(tmp_path, tokenizer, pairs, small, teacher_cache=str(tmp_path / "cache"), **SETTINGS)


def test_a_full_disk_is_survived(tmp_path, tokenizer, pairs, monkeypatch):
    """Writing fails as it does on a full disk; what was written before stays, and the next build goes on."""
    make_cache(tmp_path / "whole", tokenizer, pairs)
    import sekd.cache.store as module

    real, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; make room and run the same command again.*shard-0000"):
        make_cache(tmp_path / "cache", tokenizer, pairs)
    monkeypatch.undo()
    assert not list((tmp_path / "cache").glob("*.tmp"))
    assert list((tmp_path / "cache").glob("shard-*.arrow"))
    make_cache(tmp_path / "cache", tokenizer, pairs)
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_a_small_disk_is_survived(tmp_path, tokenizer, pairs):
    """A file system that is really full; with more room the same call goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    made = subprocess.run([*mount, "size=24k", "tmpfs", str(disk)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"a file system of 24 KiB needs the right to mount: {made.stderr.decode().strip()}")
    try:
        with pytest.raises(OSError, match="No space left on device; make room and run the same command again") as error:
            make_cache(disk / "cache", tokenizer, pairs)
        assert error.value.filename.endswith(".arrow")
        assert not list((disk / "cache").glob("*.tmp"))
        written = contents(disk / "cache")
        assert len(written) > 1, "some shards fitted"
        subprocess.run([*mount, "remount,size=1m", str(disk)], check=True)
        make_cache(disk / "cache", tokenizer, pairs)
        make_cache(tmp_path / "whole", tokenizer, pairs)
        whole = contents(tmp_path / "whole")
        assert contents(disk / "cache") == whole
        assert all(whole[name] == data for name, data in written.items() if name != MANIFEST)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# The commands


def test_build_info_verify_and_train(tmp_path, tokenizer, texts, capsys):
    import yaml

    for name, seed in (("student", 0), ("teacher", 1)):
        make_model("untied", seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    texts.to_json(tmp_path / "texts.jsonl")
    keys = dict(output_dir=str(tmp_path / "run"), model_name_or_path=str(tmp_path / "student"), rollout_engine="hf")
    keys |= dict(teacher_model_name_or_path=str(tmp_path / "teacher"), dataset_name=str(tmp_path / "texts.jsonl"))
    keys |= dict(max_length=40, max_steps=6, sample_fraction=0.5, report_to="none", save_strategy="no", logging_steps=3)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    recipe, folder = str(tmp_path / "recipe.yaml"), str(tmp_path / "cache")
    assert main(["cache", "build", recipe, "--output", folder]) == 0
    assert main(["cache", "info", folder]) == 0
    shown = capsys.readouterr().out
    assert "bytes a row" in shown
    assert "of 64 draws, 128 in the vocabulary" in shown
    assert main(["cache", "verify", folder]) == 0
    shutil.move(tmp_path / "teacher", tmp_path / "gone")  # nobody needs it any more
    assert main(["train", recipe, "--teacher_cache", folder]) == 0
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert logs[0]["selected_fraction"] < 0.3
    assert main(["cache", "info", str(tmp_path)]) == 2
    assert main(["cache", "build", recipe]) == 2
    assert "there is no folder for the cache: add --output DIR" in capsys.readouterr().err
