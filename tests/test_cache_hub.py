"""Push and pull through the real client of the hub, against a small server that keeps what it is sent."""

import os
import subprocess
import sys

import pytest
from cache_helpers import contents, damage_flip, make_cache
from hub_server import Hub, serve_hub

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(tmp_path):
    """The server's files, and a function that runs `sekd cache` with it as the hub."""
    settings = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **settings, "HF_HOME": str(tmp_path / "home")}

    def run(*command, **variables):
        command = [sys.executable, "-m", "sekd.cli", "cache", *map(str, command)]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment | variables, timeout=120, check=False
        )

    with serve_hub() as address:
        environment["HF_ENDPOINT"] = address
        yield Hub.files, run


def test_what_is_pushed_is_what_is_pulled(tmp_path, tokenizer, pairs, hub):
    files, run = hub
    make_cache(tmp_path / "cache", tokenizer, pairs)
    pushed = run("push", tmp_path / "cache", "me/cache", "--private")
    assert pushed.returncode == 0, pushed.stderr[-2000:]
    assert "the cache is at http://127.0.0.1" in pushed.stdout
    assert "sekd cache pull me/cache DIR" in files["README.md"].decode()
    assert {n: b for n, b in files.items() if n != "README.md"} == contents(tmp_path / "cache")

    pulled = run("pull", "me/cache", tmp_path / "pulled")
    assert pulled.returncode == 0, pulled.stderr[-2000:]
    assert "bytes a position" in pulled.stdout
    assert not run("verify", tmp_path / "pulled").returncode
    for name, content in contents(tmp_path / "cache").items():
        assert (tmp_path / "pulled" / name).read_bytes() == content

    make_cache(tmp_path / "other", tokenizer, pairs, class_samples=8)
    before = contents(tmp_path / "other")
    refused = run("pull", "me/cache", tmp_path / "other")
    assert refused.returncode == 2
    assert "other' holds another cache than 'me/cache'; name another folder, or delete it" in refused.stderr
    assert contents(tmp_path / "other") == before


def test_a_broken_cache_is_neither_pushed_nor_pulled(tmp_path, tokenizer, pairs, hub):
    files, run = hub
    make_cache(tmp_path / "cache", tokenizer, pairs)
    assert run("push", tmp_path / "cache", "me/cache").returncode == 0
    damage_flip(tmp_path / "cache")
    files["shard-00001.arrow"] = (tmp_path / "cache" / "shard-00001.arrow").read_bytes()
    before = dict(files)
    for command in (("push", tmp_path / "cache", "me/cache"), ("pull", "me/cache", tmp_path / "pulled")):
        refused = run(*command)
        assert refused.returncode == 2
        assert "is broken: shard-00001.arrow: the checksum differs" in refused.stderr
    assert files == before


def test_a_repository_of_something_else(tmp_path, hub):
    files, run = hub
    files["train.parquet"] = b"rows"
    refused = run("pull", "me/cache", tmp_path / "pulled")
    assert refused.returncode == 2
    assert "sekd: dataset repository 'me/cache' holds no manifest.json, so it is not a cache of sekd" in refused.stderr
    files["manifest.json"] = b"[1]"
    refused = run("pull", "me/cache", tmp_path / "pulled")
    assert refused.returncode == 2
    assert "manifest.json' is not the manifest of a teacher cache" in refused.stderr


def test_a_hub_that_cannot_be_reached_is_not_called_empty(tmp_path, hub):
    _, run = hub
    refused = run("pull", "me/cache", tmp_path / "pulled", HF_HUB_OFFLINE="1")
    assert refused.returncode == 2
    assert "offline" in refused.stderr
    assert "not a cache of sekd" not in refused.stderr
