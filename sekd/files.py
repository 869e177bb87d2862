"""Write files whole: a reader sees the old or the new content, never a part. An error for files that are damaged."""

import os


class DamagedFile(ValueError):
    """A file that a run reads is missing or damaged. The message names it, and says what to do."""


def write_atomically(path: str, text: str) -> None:
    """Write a text file. If the process dies meanwhile, the previous file stays."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
