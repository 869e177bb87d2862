"""Ray's actors write the bytes that one process writes, also when one of them is killed."""

import os
import signal
from functools import partial

import psutil
import pytest
import torch
from cache_helpers import config, contents
from helpers import VOCAB, make_model, make_trainer, save_pair

from sekd.cache.build import build_cache
from sekd.cache.readers import LocalReader, RayReaders, load_reader
from sekd.cache.teacher import CachedTeacher
from sekd.cli import main
from sekd.data.batch import Sample, collate
from sekd.data.prepare import prepare
from sekd.distill import score_positions
from sekd.distributions import entropy
from sekd.fingerprints import sample_key
from sekd.models import get_head, hidden_states
from sekd.teachers.live import LiveTeacher
from sekd.types import Batch, Positions


def test_a_byte_of_teacher_entropy(tmp_path, tokenizer, pairs):
    """What a cached teacher says of a batch: its entropy, off by at most half a 255th of ln V."""
    args = config(tmp_path, cache_teacher_entropy=True, kd_temperature=2.0)
    dataset, model = prepare(pairs, tokenizer, args), make_model("untied", 1)
    store = build_cache(dataset, LocalReader(model, VOCAB, args), tokenizer, args, str(tmp_path / "cache"))
    batch = Batch(**collate([Sample(**dataset[i]) for i in (3, 0, 7)], 122))
    state = CachedTeacher(store, {row["sample_id"]: sample_key(row) for row in dataset}).read(batch)
    live = LiveTeacher(model)
    exact = entropy(live.logits(live.read(batch)).log_softmax(-1))
    assert (state["entropy"] - exact).abs().max() <= torch.tensor(VOCAB).log() / 510 + 1e-6
    assert exact.std() > 0.1
    torch.testing.assert_close(state["probs"].sum(1), torch.ones(len(exact)))


def test_positions_by_the_teachers_entropy_from_a_cache(tmp_path, tokenizer, pairs):
    """Chunks smaller than the batch, so that rows and their entropies must stay together."""
    folder, choices = str(tmp_path / "cache"), dict(position_score="teacher_entropy", head_chunk_rows=3)
    args = config(tmp_path, cache_teacher_entropy=True)
    dataset, model = prepare(pairs, tokenizer, args), make_model("untied", 1)
    build_cache(dataset, LocalReader(model, VOCAB, args), tokenizer, args, folder)
    choices |= dict(max_length=40, max_prompt_length=20, class_samples=16, class_selection="rs_kd")
    scores = []
    for name, cache in (("cached", folder), ("live", None)):
        trainer = make_trainer(tmp_path / name, tokenizer, pairs, None, model, teacher_cache=cache, **choices)
        batch = Batch(**collate([Sample(**dataset[i]) for i in (3, 0, 7, 9)], 122))
        method, teacher = trainer.method, trainer.teacher
        hidden = hidden_states(trainer.model, batch)[batch.valid]
        positions = Positions(hidden, batch.targets[batch.valid], teacher.read(batch))
        head = get_head(trainer.model)
        scores.append(score_positions(head, teacher, positions, method.scoring, method.chunk_rows)[0])
    assert (scores[0] - scores[1]).abs().max() <= torch.tensor(VOCAB).log() / 510 + 1e-6
    assert scores[1].std() > 0.1
    trainer = make_trainer(tmp_path / "cached", tokenizer, pairs, teacher_cache=folder, **choices)
    trainer.train()

    args = config(tmp_path)
    build_cache(dataset, LocalReader(model, VOCAB, args), tokenizer, args, str(tmp_path / "without"))
    with pytest.raises(ValueError, match="holds no teacher entropy; build a cache with --cache_teacher_entropy true"):
        make_trainer(tmp_path, tokenizer, pairs, teacher_cache=str(tmp_path / "without"), **choices)


@pytest.fixture
def models(tmp_path, tokenizer, texts):
    save_pair(tmp_path, tokenizer, texts)
    return tmp_path


def is_actor(pid):
    try:
        return "ray::_Actor" in " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:  # it ended
        return False


def actors():
    """The processes of Ray's actors that this process started: another test may run its own beside it."""
    return [process.pid for process in psutil.Process().children(recursive=True) if is_actor(process.pid)]


@pytest.mark.slow
def test_ray_builds_the_same_bytes_although_a_worker_is_killed(models, capsys, monkeypatch):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    (models / "recipe.yaml").write_text(
        f"output_dir: {models}/run\nmodel_name_or_path: {models}/student\nmax_length: 40\nreport_to: none\n"
        f"teacher_model_name_or_path: {models}/teacher\ndataset_name: {models}/texts.jsonl\nrollout_engine: hf\n"
    )
    started, killed, encode_all = [], [], RayReaders.encode_all

    def kill_one(readers, parts):
        """Once the first part is here."""
        started.extend(actors())
        for part in encode_all(readers, parts):
            if not killed:
                killed.extend(started[:1])
                os.kill(killed[0], signal.SIGKILL)
            yield part

    monkeypatch.setattr(RayReaders, "encode_all", kill_one)
    monkeypatch.setattr("sekd.cache.build.build_cache", partial(build_cache, shard_samples=2))
    build = ["cache", "build", str(models / "recipe.yaml"), "--seed", "3", "--cache_teacher_entropy", "true"]
    assert main([*build, "--output", str(models / "ray"), "--engine", "ray", "--num-workers", "2"]) == 0
    assert "bytes a position" in capsys.readouterr().out
    assert len(started) == 2
    assert killed
    assert not actors()
    assert not any(is_actor(pid) for pid in started)
    assert main([*build, "--output", str(models / "here")]) == 0
    assert len(list((models / "ray").glob("shard-*.arrow"))) > 8
    assert contents(models / "ray", timed=False) == contents(models / "here", timed=False)
    assert main([*build, "--output", str(models / "more"), "--num-workers", "2"]) == 2
    assert "--num-workers 2: it is the number of Ray actors; add --engine ray" in capsys.readouterr().err
    assert not (models / "more").exists()


@pytest.mark.slow
def test_a_worker_that_cannot_load_the_teacher(tmp_path):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    gone = config(tmp_path / "run", teacher_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"a Ray worker cannot load the teacher: .*gone"):
        RayReaders(1, partial(load_reader, gone, None, VOCAB, True))
