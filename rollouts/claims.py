"""Which trainer a vLLM server belongs to. Two trainers on one server would sample with each other's weights."""

import contextlib
import errno
import fcntl
import os
import time
import uuid
from typing import IO

from rollouts.base import RolloutConfigError, RolloutError
from rollouts.http import Client

SETTLE = 1.0
"""Seconds between writing a claim and reading it again. A claim that took longer to write is withdrawn."""

MAX_SECONDS = 300.0
"""Seconds after which a server is given up that takes longer than half of ``SETTLE`` for two requests."""

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
"""Errors of file systems that have no locks. There, nobody can see whether another trainer runs."""

FREE = "released"
"""The weight version of a server that a trainer has given back."""

FAILED_LOAD = "a load failed"
"""The weight version of a server that failed to load weights and must be restarted."""


class Claim:
    """A trainer's claim to its servers, for as long as it lives.

    A server keeps one text, the weight version, which every client may read and write. A trainer writes
    ``FOLDER#RUN#NAME``, so the version says whose the weights are. A lock on ``FOLDER.lock`` says whether that trainer
    still runs; the system releases it when the process ends, however it ends.

    Whoever finds a server free writes its claim, waits ``SETTLE`` seconds and reads it again (Fischer's algorithm).
    Of several trainers that found it free, the last one to write has it: each of the others reads another text. This
    holds if nobody writes later than ``SETTLE`` seconds after it found the server free, which each one measures.

    Args:
        folder: the trainer's folder of weights; its parent, the folder of the run, is named in messages.

    Raises:
        RolloutConfigError: another engine uses the folder.
    """

    def __init__(self, http: Client, folder: str) -> None:
        self.http, self.folder = http, folder
        self.owner = f"{folder}#{uuid.uuid4().hex[:12]}"
        self.claimed: set[str] = set()
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        handle = os.open(f"{folder}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        self.lock: IO | None = os.fdopen(handle, "r+")  # closed with this object at the latest
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.lock.close()
            raise RolloutConfigError(
                f"another rollout engine sends weights from {folder}; close it, or use another output_dir"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise

    def make_version(self, name: str) -> str:
        """The weight version of weights of this trainer."""
        return f"{self.owner}#{name}"

    def owns(self, version: str) -> bool:
        """Whether this trainer wrote a weight version."""
        return version.startswith(f"{self.owner}#")

    def is_foreign(self, version: str) -> bool:
        """Whether another trainer wrote a weight version."""
        return _get_folder(version) is not None and not self.owns(version)

    def read(self, url: str, timeout: float = 30) -> str:
        """The weight version of a server.

        Raises:
            RolloutConfigError: it failed to load weights.
            RolloutError: it was this trainer's, and another one took it.
        """
        version = self.http.call(url, "/weight_info", timeout=timeout)["weight_version"]
        if version == FAILED_LOAD:
            raise RolloutConfigError(
                f"rollout server {url} failed to load weights and may still have some of the old ones; restart it"
            )
        if url in self.claimed and self.is_foreign(version):
            raise RolloutError(
                f"rollout server {url} was taken by the run in {_get_run(version)}, so it no longer has this run's "
                "weights; start a server for each run (`sekd serve STUDENT --port PORT`)"
            )
        return version

    def write(self, url: str, version: str, timeout: float = 30) -> None:
        """Set the weight version of a server."""
        self.http.call(url, "/update_weight_version", {"new_version": version}, timeout=timeout)

    def take(self, url: str) -> None:
        """Make a server this trainer's own, if it is not yet.

        Raises:
            RolloutConfigError: it is another trainer's, which runs.
            RolloutError: it stays too slow.
        """
        deadline = time.monotonic() + MAX_SECONDS
        while True:
            started = time.monotonic()
            version = self.read(url)
            if self.owns(version):
                self.claimed.add(url)
                return
            if self.is_foreign(version) and self._is_running(version):
                raise RolloutConfigError(
                    f"rollout server {url} has the weights of the run in {_get_run(version)}, which is still running, "
                    "and can serve one run only; start another server (`sekd serve STUDENT --port PORT`) and name it "
                    "in rollout_server_urls, or stop that run (`trainer.close()` in the same Python process)"
                )
            if started > deadline:
                raise RolloutError(f"rollout server {url} answers too slowly to be claimed; restart it")
            self.write(url, self.make_version("claimed"))
            if time.monotonic() - started > SETTLE / 2:
                self.write(url, FREE)  # too late: another trainer may believe that it has the server; now it notices
            time.sleep(SETTLE)

    def _is_running(self, version: str) -> bool:
        """Whether the trainer that wrote a version runs, as far as can be seen from here."""
        folder = _get_folder(version)
        if folder == self.folder:  # this trainer holds its lock, so the version is from before
            return False
        try:
            with open(f"{folder}.lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:  # locked, or in a folder of another user
            return error.errno not in NO_LOCKS
        return False

    def close(self) -> None:
        """Give the servers back. May be called twice."""
        for url in self.claimed:
            with contextlib.suppress(RolloutError, RolloutConfigError):
                if self.owns(self.read(url, timeout=5)):
                    self.write(url, FREE, timeout=5)
        self.claimed.clear()
        if self.lock is not None:
            with contextlib.suppress(FileNotFoundError):
                os.remove(f"{self.folder}.lock")
            self.lock.close()
            self.lock = None


def _get_folder(version: str) -> str | None:
    """The folder of the trainer that wrote a weight version; None if no trainer did."""
    parts = version.rsplit("#", 2)
    return parts[0] if len(parts) == 3 else None


def _get_run(version: str) -> str:
    """The folder of the run that wrote a weight version."""
    return os.path.dirname(_get_folder(version) or "")
