#!/usr/bin/env python3
"""How fast the teacher cache is built and read, and how far its size is from an ideal coder's.

    python scripts/bench_cache.py STUDENT TEACHER 'text/*.jsonl' [--sequences 64] [--rounds 5]

`bare forward` is the teacher's own forward with logits, one sample at a time as in the build. `build` is all of
`sekd cache build`. They take turns within a round, and the table has medians over rounds. `train` is a step from the
cache, forward and backward, on 20 % of the positions. The floor is the order-0 entropy of the stored numbers: the
number of classes of a position, its ids as a set, and their counts, each under its own frequencies in this cache. The
tables of frequencies are not counted.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench_table import write_figures
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from transformers.utils import logging

from sekd import SEKDConfig
from sekd.cache.build import build_cache
from sekd.cache.codec import Decoded, encode
from sekd.cache.readers import LocalReader
from sekd.cache.store import Store, write_shard
from sekd.cache.teacher import CachedTeacher
from sekd.data.batch import Sample, collate
from sekd.data.load import load_rows
from sekd.data.prepare import prepare
from sekd.distill import Method, distill
from sekd.fingerprints import sample_key
from sekd.models import count_classes, freeze, load_model, run_inside
from sekd.types import Batch

FORMATS = {"positions a second": ",.0f", "ratio": ",.2f", "bytes a position": ",.1f"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("text", help="json, jsonl, csv or parquet files with a text column")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--class_samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        bench(options, folder)


def bench(options: argparse.Namespace, folder: str) -> None:
    """Time everything on the first sequences of the text, and print the tables."""
    args = SEKDConfig(
        os.path.join(folder, "run"),
        max_length=options.max_length,
        max_prompt_length=options.max_length - 1,
        class_selection="rs_kd",
        class_samples=options.class_samples,
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(options.student)
    dataset = prepare(load_rows(options.text), tokenizer, args).take(options.sequences)
    student = load_model(options.student, dtype=torch.float32).to(args.device).train()
    teacher: Any = freeze(load_model(options.teacher, dtype=torch.bfloat16)).to(args.device)
    reader = LocalReader(teacher, count_classes(student), args)
    samples = [Sample(**row) for row in dataset]
    inputs = [Batch(**{k: v.to(args.device) for k, v in collate([s], 0).items()}) for s in samples]
    numbers = itertools.count()

    @torch.no_grad()
    def bare() -> None:
        for batch in inputs:
            teacher(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)

    def build() -> Store:
        return build_cache(dataset, reader, tokenizer, args, os.path.join(folder, f"cache{next(numbers)}"))

    store = build()
    keys = [sample_key(row) for row in dataset]
    decoded = [store.read(key) for key in keys]
    encoded = reader.encode(list(dataset))
    method = Method.from_config(args, reader.facts["vocab"])
    source = CachedTeacher(store, {row["sample_id"]: key for row, key in zip(dataset, keys, strict=True)})
    batches = [
        Batch(**{k: v.to(args.device) for k, v in collate(samples[i : i + options.batch], 0).items()})
        for i in range(0, len(samples), options.batch)
    ]

    def train() -> None:
        for batch in batches:
            with torch.autocast(args.device.type, torch.bfloat16, enabled=bool(args.bf16)):
                loss, _ = run_inside(student, lambda b: distill(student, source, b, method), batch)
            loss.backward()
            student.zero_grad()

    vocab = reader.facts["vocab"]
    work: dict[str, Callable[[], Any]] = {
        "bare forward": bare,
        "build": build,
        "train": train,
        "encode": lambda: [encode(d.ids, d.counts.astype(np.int64), vocab) for d in decoded],
        "write, synced": lambda: write_shard(os.path.join(folder, "shard.arrow"), encoded),
        "open": lambda: Store(store.folder),
        "read and decode": lambda: [store.read(key) for key in keys],
        "to tensors": lambda: [source.read(batch) for batch in batches],
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(options.rounds + 1):  # the first round warms up
        for name, function in work.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    figures = summarise(store, decoded, {name: statistics.median(times[1:]) for name, times in seconds.items()})
    for unit, values in figures.items():
        table = Table("", unit)
        table.columns[1].justify = "right"
        for name, value in values.items():
            table.add_row(name, f"{value:{FORMATS[unit]}}")
        Console().print(table)
    rows = {name: {unit: value} for unit, values in figures.items() for name, value in values.items()}
    write_figures(options.json, "the cache, medians", rows)


def summarise(store: Store, decoded: list[Decoded], seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Speeds, the ratios that matter, and sizes beside the floor, each by name."""
    positions = sum(len(d.ids) for d in decoded)
    parts = {f"{name}, order-0 entropy": bits / 8 / positions for name, bits in floor(decoded).items()}
    least, stored = sum(parts.values()), store.total("bytes") / positions
    return {
        "positions a second": {name: positions / second for name, second in seconds.items()},
        "ratio": {
            "time of build / of the bare forward": seconds["build"] / seconds["bare forward"],
            "speed of to tensors / of train": seconds["train"] / seconds["to tensors"],
            "bytes on disk / floor": stored / least,
        },
        "bytes a position": {
            **parts,
            "floor: their sum": least,
            "on disk, everything counted": stored,
            "fixed slots, 3 bytes a draw": 3 * store.fingerprint["class_samples"],
            "full fp16 logits": 2 * store.fingerprint["vocab"],
        },
    }


def floor(decoded: list[Decoded]) -> dict[str, float]:
    """Bits of all positions under an ideal order-0 coder of each kind of number."""
    used = [d.counts > 0 for d in decoded]
    lengths = np.concatenate([u.sum(1) for u in used])
    ids = np.concatenate([d.ids[u] for d, u in zip(decoded, used, strict=True)])
    counts = np.concatenate([d.counts[u] for d, u in zip(decoded, used, strict=True)])
    # The order of a position's classes has no meaning: log2 k! bits less.
    orders = np.cumsum(np.log2(np.arange(1, lengths.max() + 1)))[lengths - 1].sum()
    return {
        "number of classes": entropy_bits(lengths),
        "ids as a set": entropy_bits(ids) - float(orders),
        "counts": entropy_bits(counts),
    }


def entropy_bits(values: np.ndarray) -> float:
    _, counts = np.unique(values, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


if __name__ == "__main__":
    main()
