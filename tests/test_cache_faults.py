"""No fault of a build, a disk or a file goes unnoticed, and nothing is lost."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from cache_helpers import (
    SETTINGS,
    config,
    contents,
    damage_flip,
    damage_format,
    damage_incomplete,
    damage_manifest,
    damage_remove,
    damage_truncate,
    make_cache,
)
from helpers import VOCAB, make_model, make_tokenizer, make_trainer

from sekd.cache.build import build_cache, check_build
from sekd.cache.readers import LocalReader
from sekd.cache.store import MANIFEST, Store, verify
from sekd.cli import main
from sekd.data.prepare import prepare
from sekd.files import DamagedFile, lock_folder
from sekd.models import freeze


@pytest.fixture(scope="module")
def whole_cache(tmp_path_factory, tokenizer, pairs):
    folder = tmp_path_factory.mktemp("whole") / "cache"
    make_cache(folder, tokenizer, pairs)
    return folder


@pytest.fixture
def cache(tmp_path, whole_cache):
    """A whole cache of the pairs in ``tmp_path / "cache"``, to be damaged."""
    return Path(shutil.copytree(whole_cache, tmp_path / "cache"))


@pytest.mark.slow
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
    assert contents(tmp_path / "cut", timed=False) == contents(tmp_path / "whole", timed=False)


@pytest.mark.parametrize("name", ["notes.txt", "shard-1.arrow", "model.safetensors"])
def test_a_folder_with_other_files_is_refused(tmp_path, tokenizer, pairs, name):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "manifest.json.tmp").write_text("of a build that was killed")
    (folder / name).write_text("mine")
    for build in (make_cache, lambda folder, *_: check_build(str(folder), config(tmp_path), "local", None)):
        with pytest.raises(
            ValueError, match=rf"cache' is to be a cache, but holds other files \('{name}'\); name an empty"
        ):
            build(folder, tokenizer, pairs)
    assert sorted(path.name for path in folder.iterdir()) == sorted(["manifest.json.tmp", name])
    (folder / name).unlink()
    make_cache(folder, tokenizer, pairs.select(range(8)))


def test_two_builders_in_one_folder(tmp_path, tokenizer, pairs):
    with (
        lock_folder(str(tmp_path / "cache"), ValueError("taken")),
        pytest.raises(ValueError, match="another process is building the cache in"),
    ):
        make_cache(tmp_path / "cache", tokenizer, pairs)
    make_cache(tmp_path / "cache", tokenizer, pairs)


def test_the_lock_does_not_claim_the_errors_of_others(tmp_path):
    with pytest.raises(BlockingIOError, match="of another file"), lock_folder(str(tmp_path), ValueError("taken")):
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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, r"shard-00001.arrow' has \d+ bytes instead of \d+; delete it and build \(or pull\) again"),
        (damage_remove, "shard-00001.arrow' is missing; build \(or pull\) the cache again, which keeps the others"),
        (damage_format, "has format 99, and this version of sekd reads 2; install the version of sekd that wrote it"),
        (damage_incomplete, "is not complete; run its `sekd cache build` again to resume it"),
        (damage_manifest, "holds no manifest.json; build it with `sekd cache build RECIPE`"),
    ],
)
def test_damage_is_named_when_a_cache_is_opened(cache, tmp_path, tokenizer, pairs, damage, message):
    damage(tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        make_trainer(
            tmp_path, tokenizer, pairs, teacher_cache=str(tmp_path / "cache"), **SETTINGS | dict(disable_tqdm=True)
        )


def test_a_flipped_bit_is_never_trained_on(cache, tmp_path, capsys):
    assert not verify(str(cache))
    damage_flip(tmp_path / "cache")
    damaged = Store(str(tmp_path / "cache"))
    (problem,) = verify(damaged.folder)
    assert problem == "shard-00001.arrow: the checksum differs; delete it and build (or pull) again"
    (key,) = [key for key, place in damaged.places.items() if place == (1, 0)]
    with pytest.raises(DamagedFile, match=r"cache/shard-00001.arrow', sample 0: the bytes are damaged: their checksum"):
        damaged.read(key)
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 2
    assert "shard-00001.arrow: the checksum differs" in capsys.readouterr().err


def test_a_shard_that_is_damaged_in_mid_training_stops_the_run_in_one_line(cache, tmp_path, tokenizer, pairs):
    damage_flip(tmp_path / "cache")
    options = SETTINGS | dict(teacher_cache=str(tmp_path / "cache"), max_steps=16)
    trainer = make_trainer(tmp_path / "run", tokenizer, pairs, **options)
    with pytest.raises(
        DamagedFile, match=r"shard-00001.arrow', sample \d.*; delete it and build \(or pull\) again"
    ) as stop:
        trainer.train()
    assert trainer.state.global_step > 0
    assert "\n" not in str(stop.value)


def test_damage_in_mid_training_is_one_line_of_the_command(recipe, tmp_path, capsys):
    folder = tmp_path / "cache"
    assert main(["cache", "build", recipe, "--output", str(folder)]) == 0
    damage_flip(folder, shard=0)
    capsys.readouterr()
    assert main(["train", recipe, "--teacher_cache", str(folder), "--max_steps", "16", "--save_steps", "1"]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert re.match(
        r"sekd: stopped after step \d+: cache shard '.*/cache/shard-00000.arrow', sample 0: .*; delete", line
    )


def test_damaged_offsets_are_found_before_they_lead_out_of_the_file(cache):
    path = cache / "shard-00001.arrow"
    column, content = Store(str(cache)).shards[1].column("data"), bytearray(path.read_bytes())
    offsets = column.buffers()[1].to_pybytes()[: 8 * (len(column) + 1)]
    place = content.index(offsets) + 8 + 6  # the second offset; its sixth byte counts 2^48
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"cache/shard-00001.arrow' cannot be read"):
        Store(str(cache))


@pytest.mark.parametrize("damage", [damage_truncate, damage_remove, damage_flip])
def test_a_broken_shard_is_built_again_as_it_was(cache, tmp_path, tokenizer, pairs, damage):
    before = contents(tmp_path / "cache", timed=False)
    damage(tmp_path / "cache")
    make_cache(tmp_path / "cache", tokenizer, pairs)
    assert contents(tmp_path / "cache", timed=False) == before


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
def test_a_strange_manifest_is_refused_in_one_line(cache, tmp_path, tokenizer, pairs, capsys, strange):
    manifest = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    (tmp_path / "cache" / MANIFEST).write_text(json.dumps(STRANGE[strange](manifest)))
    capsys.readouterr()
    for command in ("info", "verify"):
        assert main(["cache", command, str(tmp_path / "cache")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "manifest.json" in line
    with pytest.raises(ValueError, match=r"manifest\.json"):
        make_cache(tmp_path / "cache", tokenizer, pairs)


def test_verify_names_every_broken_shard_and_missing_samples(cache, capsys):
    folder = cache
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"shards": manifest["shards"][:-1]}))
    assert verify(str(folder)) == [
        "manifest.json: the shards hold other samples than the cache was built from; build (or pull) again"
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
    with pytest.raises(FloatingPointError, match=rf"not finite at a position of sample {first}; look at the"):
        build_cache(dataset, reader, tokenizer, args, str(tmp_path / "cache"))
    trainer = make_trainer(tmp_path, tokenizer, pairs, None, teacher, class_selection="rs_kd", max_steps=8)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step \d+, on samples \["):
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
def test_a_cache_of_another_recipe_is_refused(cache, tmp_path, tokenizer, pairs, choices, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, pairs, teacher_cache=str(tmp_path / "cache"), **SETTINGS | choices)


def test_samples_that_are_not_in_the_cache(tmp_path, tokenizer, pairs):
    make_cache(tmp_path / "cache", tokenizer, pairs.select(range(10)))
    with pytest.raises(ValueError, match=r"lacks 54 of the 64 samples, for example sample 10; build it with"):
        make_trainer(tmp_path, tokenizer, pairs, teacher_cache=str(tmp_path / "cache"), **SETTINGS)


def test_another_tokenizer_and_a_smaller_head_are_refused(cache, tmp_path, tokenizer, pairs):
    other = make_tokenizer()
    other.chat_template = None
    with pytest.raises(ValueError, match="another value of the tokenizer or its chat template"):
        make_trainer(tmp_path, other, pairs, teacher_cache=str(tmp_path / "cache"), **SETTINGS)
    small = make_model("untied")
    small.resize_token_embeddings(126)
    with pytest.raises(ValueError, match="has 128 classes, but the student's head only 126"):
        make_trainer(tmp_path, tokenizer, pairs, small, teacher_cache=str(tmp_path / "cache"), **SETTINGS)


def test_a_full_disk_is_survived(tmp_path, tokenizer, pairs, monkeypatch):
    """Writing fails as it does on a full disk; the finished shards stay, and the next build resumes."""
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
    assert contents(tmp_path / "cache", timed=False) == contents(tmp_path / "whole", timed=False)


def test_a_small_disk_is_survived(tmp_path, tokenizer, pairs):
    """A file system that is really full; with more room the same call resumes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    made = subprocess.run([*mount, "size=24k", "tmpfs", str(disk)], capture_output=True, check=False)
    if made.returncode:
        reason = made.stderr.decode().strip()
        assert any(words in reason for words in ("permission denied", "superuser", "not permitted")), reason
        pytest.skip(f"a file system of 24 KiB needs the right to mount: {reason}")
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
        whole = contents(tmp_path / "whole", timed=False)
        assert contents(disk / "cache", timed=False) == whole
        assert all(whole[name] == data for name, data in written.items() if name != MANIFEST)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
