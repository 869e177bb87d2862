"""Files that are whole or not there."""

import os


def write_atomically(path: str, text: str) -> None:
    """The whole file or the one before it, whenever the process dies."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
