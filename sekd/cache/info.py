"""Tables: what a cache holds, and how large a cache would be."""

import math
from typing import Any

from rich.table import Table

from sekd.cache.codec import MAX_DRAWS, count_id_bytes
from sekd.cache.store import Store
from sekd.tables import print_facts, print_table

BYTES_A_DRAW = 3
"""The paper's fixed slots take 3 bytes a draw (arXiv 2602.01395, section 7.1)."""


def show_cache(store: Store) -> None:
    """Print the samples, positions, sizes and origin of a cache."""
    fingerprint = store.fingerprint
    samples, positions, classes, size = map(store.total, ("samples", "rows", "classes", "bytes"))
    draws, vocab = fingerprint["class_samples"], fingerprint["vocab"]
    position_bytes, logits_bytes, slots_bytes = size / max(positions, 1), 2 * vocab, BYTES_A_DRAW * draws
    seconds = store.manifest.get("seconds")
    entropy = "a byte a position" if fingerprint["teacher_entropy"] else "not kept"
    teacher = fingerprint["teacher"]
    facts = {
        "samples": f"{samples:,} in {len(store.shards)} shards",
        "positions": f"{positions:,}",
        "size": f"{size / 2**20:,.2f} MiB, {position_bytes:.1f} bytes a position",
        **({} if seconds is None else {"built in": f"{seconds:,.1f} s"}),
        "classes a position": f"{classes / max(positions, 1):.1f} of {draws} draws, {vocab:,} in the vocabulary",
        "full fp16 logits": (
            f"{logits_bytes:,} bytes a position: {logits_bytes / max(position_bytes, 1e-9):,.0f} times as large"
        ),
        "fixed slots": (
            f"{slots_bytes} bytes a position (3 a draw): {slots_bytes / max(position_bytes, 1e-9):.1f} times as large"
        ),
        "teacher": f"{teacher['name']} ({teacher['revision']}, {fingerprint['dtype']})",
        "teacher's entropy": entropy,
        "temperature, seed": f"{fingerprint['temperature']}, {fingerprint['seed']}",
        "data": f"{fingerprint['data']}, max_length {fingerprint['max_length']}, packing {fingerprint['packing']}",
    }
    print_facts(f"teacher cache {store.folder}", facts)


def measure_cache(folder: str) -> dict[str, Any]:
    """The vocabulary, draws and bytes a position of a cache, as arguments of :func:`show_plan`."""
    store = Store(folder)
    return {
        "vocab": store.fingerprint["vocab"],
        "draws": store.fingerprint["class_samples"],
        "position_bytes": store.total("bytes") / max(store.total("rows"), 1),
    }


def show_plan(positions: float, vocab: int, draws: int, fraction: float, position_bytes: float | None = None) -> None:
    """Print how large a cache of ``positions`` would be: the paper's table 6 for other numbers.

    ``fraction`` is the fraction of samples that are kept. ``position_bytes`` is the measured size of a position in a
    cache of the same teacher. Without it, the table has the worst case before compression, in which every draw is
    another class: a byte for their number, and an id of 3 or 4 bytes a draw (the counts, all 1, compress to nothing).

    Raises:
        ValueError: numbers that a cache cannot have.
    """
    for name, value in {"positions": positions, "vocab": vocab, "draws": draws, "sample-fraction": fraction}.items():
        if not 0 < value < math.inf or (name == "sample-fraction" and value > 1):
            limit = " and at most 1" if name == "sample-fraction" else ""
            raise ValueError(f"--{name} {value} must be above 0{limit}")
    if draws > MAX_DRAWS:
        raise ValueError(f"--draws {draws}: a cache holds at most {MAX_DRAWS}")
    source = "measured" if position_bytes else "before compression"
    position_bytes = position_bytes or 1 + count_id_bytes(vocab) * draws
    title = f"{positions:,.0f} positions, {vocab:,} classes, {draws} draws, {100 * fraction:g} % of the samples"
    table = Table("", "bytes a position", "in all", "of Full KD's", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    full = 2 * vocab
    for name, size in {
        "Full KD, fp16 logits": full,
        "RS-KD, fixed slots (paper)": BYTES_A_DRAW * draws,
        "SE-KD_3X, fixed slots (paper)": BYTES_A_DRAW * draws * fraction,
        f"RS-KD, sekd ({source})": position_bytes,
        f"SE-KD_3X, sekd ({source})": position_bytes * fraction,
        "no teacher, token ids alone": BYTES_A_DRAW,
    }.items():
        table.add_row(name, f"{size:,.1f}", _format_size(size * positions), f"{100 * size / full:.3g} %")
    print_table(table)


def _format_size(size: float) -> str:
    """A number of bytes in decimal units, which disks and the paper use."""
    unit = min(int(math.log10(max(size, 1)) // 3), 4)
    return f"{size / 1000**unit:,.2f} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"
