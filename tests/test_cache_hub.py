"""Push and pull through the real client of the hub, against a small server that keeps what it is sent."""

import huggingface_hub.constants
import pytest
from cache_helpers import contents, damage_flip, make_cache

from sekd.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs `sekd cache`, and returns its status, its output and its errors."""
    monkeypatch.setenv("HF_TOKEN", "hf_x")

    def run(*command):
        capsys.readouterr()
        return main(["cache", *map(str, command)]), *capsys.readouterr()

    return run


def test_what_is_pushed_is_what_is_pulled(tmp_path, tokenizer, pairs, hub, run):
    make_cache(tmp_path / "cache", tokenizer, pairs)
    status, printed, _ = run("push", tmp_path / "cache", "me/cache", "--private")
    assert status == 0
    assert "the cache is at http://127.0.0.1" in printed
    assert "sekd cache pull me/cache DIR" in hub["README.md"].decode()
    assert {n: b for n, b in hub.items() if n != "README.md"} == contents(tmp_path / "cache")

    status, printed, _ = run("pull", "me/cache", tmp_path / "pulled")
    assert status == 0
    assert "bytes a position" in printed
    assert run("verify", tmp_path / "pulled")[0] == 0
    for name, content in contents(tmp_path / "cache").items():
        assert (tmp_path / "pulled" / name).read_bytes() == content

    make_cache(tmp_path / "other", tokenizer, pairs, class_samples=8)
    before = contents(tmp_path / "other")
    status, _, error = run("pull", "me/cache", tmp_path / "other")
    assert status == 2
    assert "other' holds another cache than 'me/cache'; name another folder, or delete it" in error
    assert contents(tmp_path / "other") == before


def test_a_broken_cache_is_neither_pushed_nor_pulled(tmp_path, tokenizer, pairs, hub, run):
    make_cache(tmp_path / "cache", tokenizer, pairs)
    assert run("push", tmp_path / "cache", "me/cache")[0] == 0
    damage_flip(tmp_path / "cache")
    hub["shard-00001.arrow"] = (tmp_path / "cache" / "shard-00001.arrow").read_bytes()
    before = dict(hub)
    for command in (("push", tmp_path / "cache", "me/cache"), ("pull", "me/cache", tmp_path / "pulled")):
        status, _, error = run(*command)
        assert status == 2
        assert "is broken: shard-00001.arrow: the checksum differs" in error
    assert hub == before


def test_a_repository_of_something_else(tmp_path, hub, run):
    hub["train.parquet"] = b"rows"
    status, _, error = run("pull", "me/cache", tmp_path / "pulled")
    assert status == 2
    assert "sekd: dataset repository 'me/cache' holds no manifest.json, so it is not a cache of sekd" in error
    hub["manifest.json"] = b"[1]"
    status, _, error = run("pull", "me/cache", tmp_path / "pulled")
    assert status == 2
    assert "manifest.json' is not the manifest of a teacher cache" in error


def test_a_hub_that_cannot_be_reached_is_not_called_empty(tmp_path, monkeypatch, hub, run):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    status, _, error = run("pull", "me/cache", tmp_path / "pulled")
    assert status == 2
    assert "offline" in error
    assert "not a cache of sekd" not in error
