"""Build a cache: the teacher reads every kept sample once, and a few sampled classes of each position are kept."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from sekd.cache.codec import MAX_DRAWS
from sekd.cache.readers import RayReaders, Reader, load_reader
from sekd.cache.store import (
    FINGERPRINT,
    FORM,
    Store,
    hash_file,
    is_cache,
    lock_folder,
    name_samples,
    name_shard,
    read_manifest,
    read_sample,
    read_shard,
    write_manifest,
    write_shard,
)
from sekd.config import SEKDConfig
from sekd.data.prepare import check_same_tokenizer
from sekd.fingerprints import sample_key, tokenizer_fingerprint
from sekd.models import load_model
from sekd.samples import choose_samples, prepare_all


def build_fingerprint(
    keys: list[bytes],
    facts: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    args: SEKDConfig,
    shard_samples: int,
) -> dict[str, Any]:
    """The fingerprint of a cache: what a recipe must match to use it, or to resume its build.

    ``facts`` are those of the :class:`Reader`; ``keys`` name the samples.
    """
    name, revision = args.teacher_model_name_or_path, args.teacher_model_revision
    return {
        "teacher": {"name": name, "revision": revision, "weights": facts["weights"]},
        "dtype": facts["dtype"],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocab": facts["vocab"],
        "data": name_samples(keys),
        **_settings(args),
        "form": FORM,
        "shard_samples": shard_samples,
    }


def _settings(args: SEKDConfig) -> dict[str, Any]:
    return {
        "max_length": args.max_length,
        "packing": args.packing,
        "class_samples": args.class_samples,
        "temperature": args.kd_temperature,
        "seed": args.seed,
        "teacher_entropy": args.cache_teacher_entropy,
    }


def build_cache(
    dataset: Dataset,
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    args: SEKDConfig,
    folder: str,
    shard_samples: int = 256,
) -> Store:
    """Build the cache of prepared samples in ``folder``, or resume its build.

    Samples that repeat are stored once. ``shard_samples`` is the number of samples of a shard.

    Raises:
        ValueError: settings that cannot be cached, a folder with another cache, or another builder in the folder.
        OSError: a full disk. The finished shards stay, and the next call resumes the build.
    """
    if args.class_samples > MAX_DRAWS:
        raise ValueError(
            f"class_samples {args.class_samples} cannot be cached: a cache holds at most {MAX_DRAWS} draws a position"
        )
    keys = [sample_key(row) for row in dataset]
    first_index = {key: i for i, key in reversed(list(enumerate(keys)))}
    order = sorted(first_index.values())
    parts = [order[start : start + shard_samples] for start in range(0, len(order), shard_samples)]
    paths = [os.path.join(folder, name_shard(number)) for number in range(len(parts))]
    shards: dict[int, dict[str, Any]] = {}
    with lock_folder(folder):
        fingerprint = build_fingerprint(keys, reader.facts, tokenizer, args, shard_samples)
        checksums = _claim_folder(folder, fingerprint)
        bar = tqdm(total=len(order), desc="Building the cache", unit="sample", disable=args.disable_tqdm)

        def finish(number: int) -> None:
            shards[number] = _describe_shard(paths[number])
            bar.update(len(parts[number]))
            samples, positions, size = (sum(s[name] for s in shards.values()) for name in ("samples", "rows", "bytes"))
            projected = size / samples * len(order) / 2**20
            bar.set_postfix_str(f"{size / max(positions, 1):.1f} B a position, {projected:.1f} MiB in all")

        def unfinished_parts() -> Iterator[tuple[int, list[Any]]]:
            for number, part in enumerate(parts):
                if _is_whole(paths[number], [keys[i] for i in part], checksums.get(name_shard(number)), fingerprint):
                    finish(number)
                else:
                    yield number, [dataset[i] for i in part]

        for number, samples in reader.encode_all(unfinished_parts()):
            write_shard(paths[number], samples)
            finish(number)
        bar.close()
        write_manifest(folder, fingerprint, [shards[number] for number in range(len(parts))])
    return Store(folder)


def _claim_folder(folder: str, fingerprint: dict[str, Any]) -> dict[str, str]:
    """Write an incomplete manifest, or check that the folder's manifest is of this cache.

    Returns the checksum of each file that the manifest lists.
    """
    if not is_cache(folder):
        write_manifest(folder, fingerprint, None)
    manifest = read_manifest(folder)
    _compare(folder, manifest["fingerprint"], fingerprint)
    return {shard["file"]: shard["sha256"] for shard in manifest["shards"]}


def _compare(folder: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if before[name] != value:
            raise ValueError(
                f"{folder!r} holds a cache with another value of {FINGERPRINT[name][1]} ({before[name]}, "
                f"now {value}); name another folder, or delete it"
            )


def _is_whole(path: str, keys: list[bytes], checksum: str | None, fingerprint: dict[str, Any]) -> bool:
    """Whether a shard exists and is intact: by its checksum if the manifest lists one, or else by decoding it."""
    if not os.path.exists(path):
        return False
    if checksum is not None:
        return hash_file(path) == checksum
    try:
        batch = read_shard(path)
        for place in range(batch.num_rows):
            read_sample(batch, place, path, fingerprint)
    except ValueError:
        return False
    return batch.column("key").to_pylist() == keys


def _describe_shard(path: str) -> dict[str, Any]:
    batch = read_shard(path)
    return {
        "file": os.path.basename(path),
        "samples": batch.num_rows,
        "rows": sum(batch.column("rows").to_pylist()),
        "classes": sum(batch.column("classes").to_pylist()),
        "bytes": os.path.getsize(path),
        "sha256": hash_file(path),
    }


def build_of(
    rows: Dataset | IterableDataset,
    student: str,
    args: SEKDConfig,
    model_init_kwargs: dict[str, Any],
    engine: str = "local",
    workers: int | None = None,
) -> Store:
    """:func:`build_cache` for raw rows and models by name, of the samples that ``sample_fraction`` keeps.

    Only one model is in memory at a time: the student where it scores samples, then the teacher, here or in the
    ``workers`` of ``engine`` "ray".

    Raises:
        ValueError: as :func:`build_cache`, and for an engine that cannot work.
    """
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError('--engine ray needs Ray, which is not installed: run `pip install "sekd[ray]"`')
    if workers is not None and (engine != "ray" or workers < 1):
        raise ValueError(f"--num-workers {workers}: it is the number of Ray actors; add --engine ray, and at least 1")
    folder = str(args.teacher_cache)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"--output {folder!r} is a file; name a folder for the cache")
    if is_cache(folder):  # what can be known before models load
        _compare(folder, read_manifest(folder)["fingerprint"], _settings(args))
    tokenizer, dataset = prepare_all(rows, student, args, model_init_kwargs)
    if args.sample_fraction < 1:
        model = load_model(student, **{"dtype": torch.float32, **model_init_kwargs})
        dataset = dataset.select(choose_samples(dataset, model, None, tokenizer, args)["kept"])
        del model
    name = str(args.teacher_model_name_or_path)
    check_same_tokenizer(tokenizer, AutoTokenizer.from_pretrained(name, revision=args.teacher_model_revision))
    config = AutoConfig.from_pretrained(student, revision=model_init_kwargs.get("revision") or "main")
    load = partial(
        load_reader,
        args,
        model_init_kwargs.get("attn_implementation"),
        config.get_text_config().vocab_size,
        "seq_lengths" in dataset.column_names,
    )
    if engine == "local":
        return build_cache(dataset, load(args.device), tokenizer, args, folder)
    with closing(RayReaders(workers or 1, load)) as readers:
        return build_cache(dataset, readers, tokenizer, args, folder)
