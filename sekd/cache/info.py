"""What a cache holds, as a table."""

from rich.console import Console
from rich.table import Table

from sekd.cache.store import Store


def show_cache(store: Store) -> None:
    """Print samples, rows, sizes and the origin of a cache."""
    found, shards = store.fingerprint, store.manifest["shards"]
    samples, rows, classes, size = (sum(s[key] for s in shards) for key in ("samples", "rows", "classes", "bytes"))
    draws, vocab = found["class_samples"], found["vocab"]
    per_row = size / max(rows, 1)
    table = Table(title=f"teacher cache {store.folder}", title_justify="left", show_header=False)
    for name, value in {
        "samples": f"{samples:,} in {len(shards)} shards",
        "rows": f"{rows:,}",
        "size": f"{size / 2**20:,.2f} MiB, {per_row:.1f} bytes a row",
        "classes a row": f"{classes / max(rows, 1):.1f} of {draws} draws, {vocab:,} in the vocabulary",
        "full fp16 logits": f"{2 * vocab:,} bytes a row: {2 * vocab / max(per_row, 1e-9):,.0f} times as large",
        "fixed slots": f"{3 * draws} bytes a row (3 a draw): {3 * draws / max(per_row, 1e-9):.1f} times as large",
        "teacher": f"{found['teacher']['name']} ({found['teacher']['revision']}, {found['dtype']})",
        "temperature, seed": f"{found['temperature']}, {found['seed']}",
        "data": f"{found['data']}, max_length {found['max_length']}, packing {found['packing']}",
    }.items():
        table.add_row(name, value)
    Console().print(table)
