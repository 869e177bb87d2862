"""A real vLLM server, one that spoils what it answers, and a small one without vLLM."""

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

from helpers import EOS
from rollout_helpers import model_logps
from safetensors.torch import load_file

from rollouts import HFEngine

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
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()

    def shutdown(self):
        """Refuse connections from now on, which would otherwise wait for an answer."""
        super().shutdown()
        self.server_close()


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


class Served:
    """What a server holds: a model and its weight version. One thing happens at a time, as in vLLM's engine core."""

    def __init__(self, model, takes_weights=True):
        self.model, self.takes_weights = model, takes_weights
        self.version, self.core = "default", threading.Lock()


class SmallServer(ThreadingHTTPServer):
    """Answers as vLLM's server does, with transformers. Several may share what they hold: a door for each client.

    ``before`` gets the path and body of each request, before it has an effect.
    """

    daemon_threads = True

    def __init__(self, served, before=lambda path, body: None):
        self.served, self.before = served, before
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        length = int(self.headers["Content-Length"] or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        path = self.path.split("?")[0]
        self.server.before(path, body)
        with self.server.served.core:
            answer = ANSWERS[path](self.server.served, body)
        content = json.dumps(answer).encode() if answer is not None else b""
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *arguments):
        pass


def set_version(served, body):
    served.version = body["new_version"]


def load_weights(served, body):
    weights = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
    if served.takes_weights:
        served.model.load_state_dict(weights, strict=False)
    return {"results": [None]}


def complete(served, body):
    options = dict(stop_token_ids=[EOS], seed=body.get("seed"))
    engine = HFEngine(served.model, body["temperature"], body["max_tokens"], **options)
    (rollout,) = engine.generate([body["prompt"]])
    choice = dict(
        token_ids=rollout.completion_ids, finish_reason=rollout.finish_reason, prompt_token_ids=rollout.prompt_ids
    )
    if "prompt_logprobs" in body:
        logps = model_logps(served.model, body["prompt"]).tolist()
        entries = [{str(t): {"logprob": logp}} for t, logp in zip(body["prompt"][1:], logps, strict=True)]
        choice["prompt_logprobs"] = [None, *entries]
    return {"choices": [choice]}


INFO = {"vllm_config": {"model_config": {"max_model_len": 64, "max_logprobs": 20}}, "vllm_env": {}}
ANSWERS = {
    "/health": lambda served, body: None,
    "/version": lambda served, body: {"version": "0.32"},
    "/server_info": lambda served, body: INFO,
    "/weight_info": lambda served, body: {"weight_version": served.version},
    "/update_weight_version": set_version,
    "/collective_rpc": load_weights,
    "/reset_prefix_cache": lambda served, body: None,
    "/v1/completions": complete,
}
