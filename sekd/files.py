"""Write files whole: a reader sees the old or the new content, never a part."""

import os


def write_atomically(path: str, text: str) -> None:
    """Write a text file. If the process dies meanwhile, the previous file stays."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
