"""What a cache holds, and what one would take, as tables."""

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from sekd.cache.codec import MAX_DRAWS, count_id_bytes
from sekd.cache.store import Store

BYTES_A_DRAW = 3
"""Of the paper's fixed slots (arXiv 2602.01395, section 7.1)."""


def show_cache(store: Store) -> None:
    """Print samples, rows, sizes and the origin of a cache."""
    found = store.fingerprint
    samples, rows, classes, size = map(store.total, ("samples", "rows", "classes", "bytes"))
    draws, vocab = found["class_samples"], found["vocab"]
    per_row = size / max(rows, 1)
    slots, entropy = BYTES_A_DRAW * draws, "a byte a row" if found["teacher_entropy"] else "not kept"
    table = Table(title=f"teacher cache {store.folder}", title_justify="left", show_header=False)
    for name, value in {
        "samples": f"{samples:,} in {len(store.shards)} shards",
        "rows": f"{rows:,}",
        "size": f"{size / 2**20:,.2f} MiB, {per_row:.1f} bytes a row",
        "classes a row": f"{classes / max(rows, 1):.1f} of {draws} draws, {vocab:,} in the vocabulary",
        "full fp16 logits": f"{2 * vocab:,} bytes a row: {2 * vocab / max(per_row, 1e-9):,.0f} times as large",
        "fixed slots": f"{slots} bytes a row (3 a draw): {slots / max(per_row, 1e-9):.1f} times as large",
        "teacher": f"{found['teacher']['name']} ({found['teacher']['revision']}, {found['dtype']})",
        "teacher's entropy": entropy,
        "temperature, seed": f"{found['temperature']}, {found['seed']}",
        "data": f"{found['data']}, max_length {found['max_length']}, packing {found['packing']}",
    }.items():
        table.add_row(name, value)
    Console().print(table)


def measured(folder: str) -> dict[str, Any]:
    """Vocabulary, draws and bytes a row of the cache in a folder, for :func:`show_plan`."""
    store = Store(folder)
    found, per_row = store.fingerprint, store.total("bytes") / max(store.total("rows"), 1)
    return {"vocab": found["vocab"], "draws": found["class_samples"], "per_row": per_row}


def show_plan(positions: float, vocab: int, draws: int, fraction: float, per_row: float | None = None) -> None:
    """Print what a cache of so many positions would take: the paper's table 6 for one's own numbers.

    ``per_row`` is what a cache of the same teacher took, in bytes; without it our own rows show what the draws
    of a long sample take before compression, if all are different.

    Raises:
        ValueError: numbers that no cache can have.
    """
    for name, value in {"positions": positions, "vocab": vocab, "draws": draws, "sample-fraction": fraction}.items():
        if not 0 < value < math.inf or (name == "sample-fraction" and value > 1):
            limit = " and at most 1" if name == "sample-fraction" else ""
            raise ValueError(f"--{name} {value} must be above 0{limit}")
    if draws > MAX_DRAWS:
        raise ValueError(f"--draws {draws}: a cache holds at most {MAX_DRAWS}")
    ours = per_row or 1 + count_id_bytes(vocab) * draws
    word = "measured" if per_row else "before compression"
    title = f"{positions:,.0f} positions, {vocab:,} classes, {draws} draws, {100 * fraction:g} % of the samples"
    table = Table("", "bytes a position", "in all", "of Full KD's", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    full = 2 * vocab
    for name, size in {
        "Full KD, fp16 logits": full,
        "RS-KD, fixed slots (paper)": BYTES_A_DRAW * draws,
        "SE-KD_3X, fixed slots (paper)": BYTES_A_DRAW * draws * fraction,
        f"RS-KD, sekd ({word})": ours,
        f"SE-KD_3X, sekd ({word})": ours * fraction,
        "no teacher, token ids alone": BYTES_A_DRAW,
    }.items():
        table.add_row(name, f"{size:,.1f}", _size(size * positions), f"{100 * size / full:.3g} %")
    Console().print(table)


def _size(size: float) -> str:
    """Decimal units, as disks are sold and the paper counts."""
    unit = min(int(math.log10(max(size, 1)) // 3), 4)
    return f"{size / 1000**unit:,.2f} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"
