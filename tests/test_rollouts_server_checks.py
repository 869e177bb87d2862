"""What listens on a server's port is named in one short line."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import make_model, make_trainer
from serving import Served, SmallServer

from rollouts import RolloutConfigError, RolloutError
from rollouts.http import Client, shorten
from rollouts.server_checks import wait_for_server

PAGE = b"<!DOCTYPE html>\n<html><body>" + b"<p>it works</p>\n" * 500 + b"</body></html>"


class Service(BaseHTTPRequestHandler):
    """Gives the same answer everywhere."""

    def do_GET(self):
        status, content = self.server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve():
    servers = []

    def serve(status, content):
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Service))
        servers[-1].answer = status, content
        threading.Thread(target=servers[-1].serve_forever, args=[0.02], daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "content", "reason"),
    [
        (404, PAGE, "refused: 404: an HTML page"),
        (200, PAGE, "/version answers an HTML page"),
        (200, b"", "/version answers nothing"),
        (200, b'["a list"]', "/version answers"),
        (403, b"go\x1b[2J away\n\n", r"refused: 403: 'go\\x1b[2J away'"),
    ],
    ids=["no page", "a page", "nothing", "other JSON", "escape sequences"],
)
def test_another_service_is_refused_in_one_short_line(tmp_path, tokenizer, pairs, serve, status, content, reason):
    url = serve(status, content)
    options = dict(lmbda=1.0, rollout_engine="vllm_server", rollout_server_urls=[url], max_prompt_length=16)
    with pytest.raises(RolloutConfigError) as caught:
        make_trainer(tmp_path, tokenizer, pairs, **options).train()
    message = str(caught.value)
    assert message.startswith(f"rollout_server_urls: {url} is not a vLLM server (")
    assert reason.replace(r"\\", "\\") in message
    assert len(message) < 250
    assert message.isprintable()


def test_a_service_that_is_not_ready_is_waited_for(serve):
    with pytest.raises(RolloutError, match=r"did not answer within 1 s .*answered 503: an HTML page\)"):
        wait_for_server(Client(5), serve(503, PAGE), 1)
    wait_for_server(Client(5), SmallServer(Served(make_model("untied"))).url, 1)


def test_answers_are_one_line():
    assert shorten(b" a\n  b\x1b") == r"'a b\x1b'"
    assert len(shorten(b"a" * 10_000)) < 400
