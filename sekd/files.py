"""Write files whole and checked: a reader sees the old or the new content, never a part."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

logger = logging.getLogger(__name__)
LOOK = 0.1
"""Seconds to wait for a lock again: :func:`is_locked` holds one for an instant."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
"""Errors of file systems that have no locks."""


class DamagedFile(ValueError):
    """A file that a run reads is missing or damaged. The message names it, and says what to do."""


def write_atomically(path: str, content: str | bytes, is_shared: bool = False) -> None:
    """Write a file. If the process dies meanwhile, the previous file stays, and a file ``.tmp`` beside it.

    The next write replaces the latter, unless ``is_shared``: other processes may write the same file at the same time.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp" if is_shared else f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def write_checked(path: str, content: dict[str, Any]) -> None:
    """Write a mapping as JSON with a checksum of its own, which :func:`read_checked` compares."""
    write_atomically(path, json.dumps({**content, "checksum": _hash_content(content)}) + "\n")


def read_checked(path: str) -> dict[str, Any]:
    """The mapping that :func:`write_checked` wrote.

    Raises:
        DamagedFile: the file is damaged, or something else wrote it.
    """
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise DamagedFile(f"{path!r} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict) or "checksum" not in content:
        raise DamagedFile(f"{path!r} has no checksum")
    if content.pop("checksum") != _hash_content(content):
        raise DamagedFile(f"{path!r} is damaged: its checksum differs")
    return content


def _hash_content(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_quickly(path: str) -> int:
    """The CRC-32 of a file, which finds damage. It is no protection against intent."""
    code = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            code = zlib.crc32(block, code)
    return code


def sync(path: str) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move_files(source: str, target: str) -> None:
    """Move the files of a folder into another one, where each replaces its namesake at once. The source goes."""
    for name in os.listdir(source):
        sync(os.path.join(source, name))
        os.replace(os.path.join(source, name), os.path.join(target, name))
    os.rmdir(source)
    sync(target)


@contextmanager
def lock_folder(folder: str, refusal: ValueError) -> Iterator[None]:
    """Let one process alone use a folder, which is made if it is missing. The lock ends with the process.

    On a file system without locks there is only a warning.

    Raises:
        ValueError: another process has the lock: ``refusal``.
    """
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(LOOK)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise refusal from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning(f"the file system of {folder!r} has no locks: let no other process write there")
        yield
    finally:
        os.close(handle)


def is_locked(folder: str) -> bool:
    """Whether a process holds :func:`lock_folder`; False on a file system without locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    finally:
        os.close(handle)
    return False
