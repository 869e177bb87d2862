"""Requests to a rollout server, and the two ways in which they can fail."""

import contextlib
import json
import socket
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from rollouts.base import RolloutConfigError, RolloutError


class ServerUnavailable(RolloutError):
    """The server did not answer. It may answer later, or another server may."""


class RequestRejected(RolloutConfigError):
    """The server refuses the request, and would refuse it again."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Client:
    """JSON over HTTP. It ignores the environment's proxies, which are for outside servers.

    ``timeout`` is in seconds, for one answer. Threads may share a client.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.connections: set[HTTPConnection] = set()

    def call(self, url: str, path: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> Any:
        """The server's answer, decoded from JSON; None if it is empty. GET without a body, else POST."""
        content = self.send(url, path, body, timeout)
        try:
            return json.loads(content) if content else None
        except ValueError as error:
            raise ServerUnavailable(f"rollout server {url} did not answer with JSON, but {shorten(content)}") from error

    def send(self, url: str, path: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> bytes:
        """The server's answer in bytes."""
        address = urlsplit(url)
        kind = HTTPSConnection if address.scheme == "https" else HTTPConnection
        connection = kind(address.hostname or "", address.port, timeout=timeout or self.timeout)
        self.connections.add(connection)
        try:
            method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
            connection.request(method, address.path + path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except (HTTPException, OSError) as error:
            raise ServerUnavailable(f"rollout server {url} does not answer: {error or type(error).__name__}") from error
        finally:
            self.connections.discard(connection)
            connection.close()
        if response.status == 200:
            return content
        text = f"{response.status}: {shorten(content)}"
        if 400 <= response.status < 500 and response.status not in (408, 429):
            raise RequestRejected(f"rollout server {url}{path} refused: {text}", response.status)
        raise ServerUnavailable(f"rollout server {url} answered {text}")

    def close(self) -> None:
        """Abort the requests in progress: a server may be in the middle of an answer, or hang."""
        for connection in [*self.connections]:
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)


def shorten(content: bytes) -> str:
    """What a server answered, as one line for a message. A page for a browser is only named."""
    text = " ".join(content.decode(errors="replace").split())
    if text.startswith("<"):
        return "an HTML page"
    return repr(text[:300]) if text else "nothing"
