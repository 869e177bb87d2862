"""A real vLLM server, and one that spoils what it answers."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Server:
    """`scripts/serve_student.sh` on a free port; it can be killed and started again."""

    def __init__(self, model, *options, eager=True):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.options = ["--max-model-len", "64", *["--enforce-eager"] * eager, *options]
        self.model, self.url = str(model), f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        command = ["bash", str(ROOT / "scripts" / "serve_student.sh"), self.model, "--port", str(self.port)]
        with open(f"{self.model}.log", "w") as log:
            self.process = subprocess.Popen(
                [*command, *self.options], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def restart(self, *options):
        self.kill()
        self.options += [option for option in options if option not in self.options]
        self.start()

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Faulty(ThreadingHTTPServer):
    """Stands before the real server, and spoils the completions that ``spoil`` says."""

    daemon_threads = True

    def __init__(self, target, spoil):
        self.target, self.spoil, self.asked, self.lock = target, spoil, 0, threading.Lock()
        super().__init__(("127.0.0.1", 0), Between)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Between(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        request = urllib.request.Request(
            self.server.target + self.path, body or None, {"Content-Type": "application/json"}, method=self.command
        )
        with self.server.lock:
            self.server.asked += "/completions" in self.path
            number = self.server.asked
        with urllib.request.urlopen(request) as response:
            status, content = response.status, response.read()
        if "/completions" in self.path:
            status, content = self.server.spoil(number, status, content)
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.headers["Content-Length"] = self.headers["Content-Length"] or "0"
        self.do_POST()

    def log_message(self, *arguments):
        pass


def spoil_error(content):
    return 500, b'{"error": "out of memory"}'


def spoil_garbage(content):
    return 200, b"<html>it works</html>"


def spoil_fewer(content):
    return 200, json.dumps(json.loads(content) | {"choices": []}).encode()


def spoil_other_prompt(content):
    answer = json.loads(content)
    answer["choices"][0]["prompt_token_ids"] = [9, 9]
    return 200, json.dumps(answer).encode()


def spoil_hang(content):
    time.sleep(6)
    return 200, content
