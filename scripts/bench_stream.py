#!/usr/bin/env python3
"""How much memory and time a stream of documents takes, from the file to the batches of a run. No model is loaded.

    python scripts/bench_stream.py STUDENT 'text/*.jsonl' [--documents 1000000] [--words 40] [--shuffle_buffer 1000]

It writes a JSONL file that repeats the documents of `text`, each with its number as the first word, and reads it as
`dataset_streaming: true` does: tokenize, pack into sequences of --max_length, order, load, collate. At 1,000, 10,000,
100,000, 200,000, ... documents it prints the resident memory and its highest value so far, the speed since the last
line, and the share of padding so far. Processor seconds count, so other programs do not disturb them: with
TOKENIZERS_PARALLELISM=false, it is the speed of one core. Memory grows in the first lines, where buffers fill.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import psutil
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from transformers.utils import logging

from sekd import SEKDConfig
from sekd.data.batch import Sample, collate
from sekd.data.load import load_rows
from sekd.samples import order_stream, prepare_samples

MIB = 2**20
COLUMNS = "documents", "tokens", "MiB", "highest MiB", "documents/s", "tokens/s", "padding"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="the folder or hub id of the student; its tokenizer alone is read")
    parser.add_argument("text", help="json, jsonl, csv or parquet files with a text column")
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, help="words of each document that are kept; all by default")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--shuffle_buffer", type=int, default=0)
    options = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "documents.jsonl")
        write_documents(path, options.text, options.documents, options.words)
        print(f"{options.documents} documents, {os.path.getsize(path) / 1e9:.2f} GB")
        measure(path, options)


def write_documents(path: str, text: str, count: int, words: int | None) -> None:
    """Write ``count`` documents that repeat the texts, each with its number before it."""
    texts = [" ".join(row["text"].split(" ")[:words]) for row in load_rows(text)]
    with Path(path).open("w") as file:
        for number in range(count):
            file.write(json.dumps({"text": f"{number} {texts[number % len(texts)]}"}) + "\n")


def measure(path: str, options: argparse.Namespace) -> None:
    """Read the file once, as a run does, and print the lines."""
    tokenizer = AutoTokenizer.from_pretrained(options.student)
    args = SEKDConfig(
        output_dir="unused",
        max_length=options.max_length,
        per_device_train_batch_size=options.batch,
        max_steps=10**9,
        shuffle_buffer=options.shuffle_buffer,
    )
    samples = prepare_samples(load_rows(path, streaming=True), tokenizer, args)
    loader = DataLoader(order_stream(samples, args), batch_size=options.batch, collate_fn=make_samples)
    print(" ".join(f"{name:>13}" for name in COLUMNS))
    line, documents, tokens, grid = 1000, 0, 0, 0
    since, before = time.process_time(), (0, 0)
    for batch in loader:
        width = collate(batch, 0)["input_ids"].shape[1]
        assert width <= options.max_length
        grid += len(batch) * options.max_length
        tokens += sum(len(sample.input_ids) for sample in batch)
        documents += sum(sample.input_ids.count(tokenizer.eos_token_id) for sample in batch)
        if documents < min(line, options.documents):
            continue
        seconds = time.process_time() - since
        values = [
            f"{documents:,}",
            f"{tokens:,}",
            f"{psutil.Process().memory_info().rss / MIB:.0f}",
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}",
            f"{(documents - before[0]) / seconds:,.0f}",
            f"{(tokens - before[1]) / seconds:,.0f}",
            f"{1 - tokens / grid:.2%}",
        ]
        print(" ".join(f"{value:>13}" for value in values), flush=True)
        if documents >= options.documents:
            break
        line, since, before = min(line * 10, line + 100_000), time.process_time(), (documents, tokens)


def make_samples(rows: list[dict]) -> list[Sample]:
    """The loader's collator: batches stay lists until the step is known."""
    return [Sample(**row) for row in rows]


if __name__ == "__main__":
    main()
