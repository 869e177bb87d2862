"""The checkpoints of a run. A folder named ``checkpoint-N`` is complete, unless it was damaged later.

A checkpoint is written under :data:`UNFINISHED`. When all its files are on the disk, :func:`finish_checkpoint` adds
``checkpoint.json``, which lists every file with its size and checksum, and gives the folder its name. A process that
dies earlier leaves no folder with that name. :func:`find_checkpoint` compares every byte.
"""

import os
import re
import shutil
from typing import Any

from transformers.utils import logging

from sekd.files import hash_quickly, read_checked, sync, write_checked

logger = logging.get_logger(__name__)

UNFINISHED = ".sekd-unfinished"
"""The folder, in the folder of a run, in which a checkpoint is written."""

MANIFEST = "checkpoint.json"
FORMAT = 1


class RunRefused(ValueError):
    """A run cannot begin in its folder, or cannot resume from a checkpoint. The message says why, and what to do."""


def name_checkpoint(folder: str, step: int) -> str:
    """The path of the checkpoint of a step."""
    return os.path.join(folder, f"checkpoint-{step}")


def list_checkpoints(folder: str) -> dict[int, str]:
    """The paths of the checkpoints in a folder by their steps, the first step first. They may be damaged."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = [int(match[1]) for name in names if (match := re.fullmatch(r"checkpoint-(\d+)", name))]
    return {step: name_checkpoint(folder, step) for step in sorted(steps)}


def finish_checkpoint(written: str, facts: dict[str, Any]) -> str:
    """Give a completely written checkpoint its final name, and return its path.

    ``written`` is ``FOLDER/.sekd-unfinished/checkpoint-N``. ``facts`` becomes a part of ``checkpoint.json``. A
    checkpoint of this step by the same run stays, since it has the same content; one of another run is replaced.
    """
    files = {}
    for folder, _, names in os.walk(written):
        for name in names:
            path = os.path.join(folder, name)
            files[os.path.relpath(path, written)] = [os.path.getsize(path), hash_quickly(path)]
            sync(path)
        sync(folder)
    write_checked(os.path.join(written, MANIFEST), {"format": FORMAT, "files": files, **facts})
    sync(written)
    parent, name = os.path.split(written)
    final = os.path.join(os.path.dirname(parent), name)
    if os.path.exists(final) and _read_run(final) != facts["run"]:
        remove_folder(final)
    if not os.path.exists(final):
        os.replace(written, final)
    sync(os.path.dirname(parent))
    remove_unfinished(os.path.dirname(parent))
    return final


def _read_run(checkpoint: str) -> str | None:
    try:
        return check_checkpoint(checkpoint)["run"]
    except RunRefused:  # damaged
        return None


def remove_folder(path: str) -> None:
    """Delete a folder. It is renamed first, so that a half-deleted folder is never read as a checkpoint."""
    parent, name = os.path.split(path)
    doomed = os.path.join(parent, UNFINISHED, f"{name}.deleted")
    os.makedirs(os.path.dirname(doomed), exist_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_unfinished(folder: str) -> None:
    """Delete what a process that died left half written or half deleted in the folder of a run."""
    shutil.rmtree(os.path.join(folder, UNFINISHED), ignore_errors=True)


def rotate_checkpoints(folder: str, limit: int | None, protected: set[str]) -> None:
    """Delete the oldest checkpoints until ``limit`` are left. ``protected`` paths stay. None, 0 and -1 keep all."""
    checkpoints = [*list_checkpoints(folder).values()]
    excess = len(checkpoints) - limit if limit and limit > 0 else 0
    for path in [path for path in checkpoints if path not in protected][: max(0, excess)]:
        remove_folder(path)
    remove_unfinished(folder)


def read_facts(checkpoint: str) -> dict[str, Any]:
    """The content of ``checkpoint.json``.

    Raises:
        RunRefused: the folder is missing, or has no valid ``checkpoint.json``.
    """
    if not os.path.isdir(checkpoint):
        raise RunRefused(f"resume_from_checkpoint {checkpoint!r}: there is no such folder")
    path = os.path.join(checkpoint, MANIFEST)
    if not os.path.isfile(path):
        raise RunRefused(f"{checkpoint!r} has no {MANIFEST}, so it is not a whole checkpoint of this version of sekd")
    try:
        facts = read_checked(path)
    except (ValueError, OSError) as error:
        raise RunRefused(str(error)) from error
    if facts["format"] != FORMAT:
        raise RunRefused(f"{checkpoint!r} was written by another version of sekd (format {facts['format']})")
    return facts


def check_checkpoint(checkpoint: str) -> dict[str, Any]:
    """Compare every file of a checkpoint with ``checkpoint.json``, and return its content.

    Raises:
        RunRefused: a file is missing, or has other content. The message names it.
    """
    facts = read_facts(checkpoint)
    for name, (size, checksum) in facts["files"].items():
        path = os.path.join(checkpoint, name)
        if not os.path.isfile(path):
            raise RunRefused(f"{checkpoint!r} is damaged: {name} is missing")
        try:
            is_same = os.path.getsize(path) == size and hash_quickly(path) == checksum
        except OSError as error:
            raise RunRefused(f"{checkpoint!r} is damaged: {name} cannot be read ({error.strerror})") from error
        if not is_same:
            raise RunRefused(f"{checkpoint!r} is damaged: {name} has other content than was written")
    return facts


def find_checkpoint(folder: str) -> str:
    """The newest whole checkpoint in a folder. Each one that is left out is named in a warning.

    Raises:
        RunRefused: there is none.
    """
    for checkpoint in reversed(list_checkpoints(folder).values()):
        try:
            check_checkpoint(checkpoint)
            return checkpoint
        except RunRefused as error:
            logger.warning(f"{error}; it is left out")
    raise RunRefused(f"resume_from_checkpoint: there is no whole checkpoint in output_dir {folder!r}; start again")


def set_later_aside(folder: str, step: int) -> None:
    """Rename the checkpoints after ``step``, from which a run resumes: its later checkpoints will be others."""
    for later, checkpoint in list_checkpoints(folder).items():
        if later > step:
            old = f"{checkpoint}.old"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(checkpoint, old)
            logger.warning(f"the run resumes from step {step}, so {checkpoint!r} is renamed to {old!r}")
