"""A small server with the part of the hub's interface that the tests need. It keeps every upload."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789" * 4


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that commits and downloads of small files use."""

    files: dict[str, bytes]
    refuses: bool  # every commit
    seconds: float  # that each upload waits

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
            kind = "datasets/" if json.loads(body).get("type") == "dataset" else ""
            name = "/".join(filter(None, (json.loads(body).get("organization"), json.loads(body)["name"])))
            self.answer({"url": f"http://{self.headers['Host']}/{kind}{name}"})
        elif self.path.startswith("/api/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            time.sleep(self.seconds)
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [dict(path=n, uploadMode="regular", shouldIgnore=False, oid=None) for n in names]})
        elif "/commit/" in self.path and not self.refuses:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.files[line["value"]["path"]]
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


@contextmanager
def serve_hub() -> Iterator[str]:
    """The address of an empty hub, whose files are in ``Hub.files``."""
    Hub.files, Hub.refuses, Hub.seconds = {}, False, 0.0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
