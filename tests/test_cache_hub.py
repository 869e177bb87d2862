"""Push and pull through the real client of the hub, against a small server that keeps what it is sent."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cache_helpers import contents, damage_flip, make_cache

pytestmark = pytest.mark.slow


COMMIT = "0123456789" * 4


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that commits and downloads of small files use."""

    files: dict[str, bytes]

    def answer(self, content, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/api/repos/create"):
            self.answer({"url": f"http://{self.headers['Host']}/datasets/me/cache"})
        elif self.path.startswith("/api/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [dict(path=n, uploadMode="regular", shouldIgnore=False, oid=None) for n in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {
                    "success": True,
                    "commitOid": COMMIT,
                    "commitUrl": f"http://{self.headers['Host']}/datasets/me/cache/commit/{COMMIT}",
                }
            )
        else:
            self.send_error(404)

    def do_GET(self):
        name = self.path.split("?")[0].rpartition("/")[2]
        if "/revision/" in self.path or self.path.endswith("/api/datasets/me/cache"):
            self.answer(dict(id="me/cache", sha=COMMIT, siblings=[{"rfilename": n} for n in self.files]))
        elif "/tree/" in self.path:
            self.answer([dict(type="file", path=n, size=len(b), oid="0") for n, b in self.files.items()])
        elif "/resolve/" in self.path and name in self.files:
            tag = hashlib.sha1(self.files[name]).hexdigest()
            self.answer(self.files[name], ETag=f'"{tag}"', X_Repo_Commit=COMMIT)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    """The server's files, and a function that runs `sekd cache` with it as the hub."""
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    settings = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **settings, "HF_HOME": str(tmp_path / "home")}

    def run(*command, **variables):
        command = [sys.executable, "-m", "sekd.cli", "cache", *map(str, command)]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment | variables, timeout=120, check=False
        )

    yield Hub.files, run
    server.shutdown()


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
