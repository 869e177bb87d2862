"""Build a cache: the teacher reads every kept sample once, and a few sampled classes of each position are kept."""

import importlib.util
import os
import time
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sekd.cache.codec import MAX_DRAWS
from sekd.cache.readers import Reader
from sekd.cache.store import (
    FINGERPRINT,
    FORM,
    Store,
    check_cache_folder,
    hash_file,
    is_cache,
    name_samples,
    name_shard,
    read_manifest,
    read_sample,
    read_shard,
    write_manifest,
    write_shard,
)
from sekd.config import SEKDConfig
from sekd.data.prepare import check_token_ids
from sekd.files import lock_folder
from sekd.fingerprints import sample_key, tokenizer_fingerprint


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

    Samples that repeat are stored once. ``shard_samples`` is the number of samples of a shard. The manifest gets the
    seconds of the build. A resumed build gets what the whole would take at the speed of the last call.

    Raises:
        ValueError: settings that cannot be cached; a token that the teacher lacks; a folder with another cache, other
            files or another builder.
        OSError: a full disk. The finished shards stay, and the next call resumes the build.
    """
    if args.class_samples > MAX_DRAWS:
        raise ValueError(
            f"class_samples {args.class_samples} cannot be cached: a cache holds at most {MAX_DRAWS} draws a position"
        )
    check_token_ids(dataset, reader.facts["vocab"])
    keys = [sample_key(row) for row in dataset]
    first_index = {key: i for i, key in reversed(list(enumerate(keys)))}
    order = sorted(first_index.values())
    parts = [order[start : start + shard_samples] for start in range(0, len(order), shard_samples)]
    paths = [os.path.join(folder, name_shard(number)) for number in range(len(parts))]
    shards: dict[int, dict[str, Any]] = {}
    refusal = ValueError(f"another process is building the cache in {folder!r}; wait for it, or name another folder")
    with lock_folder(folder, refusal):
        fingerprint = build_fingerprint(keys, reader.facts, tokenizer, args, shard_samples)
        checksums, seconds = _claim_folder(folder, fingerprint)
        read, started = 0, time.monotonic()
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
            read += len(samples)
        bar.close()
        if read:
            seconds = (time.monotonic() - started) * len(order) / read
        write_manifest(folder, fingerprint, [shards[number] for number in range(len(parts))], seconds)
    return Store(folder)


def _claim_folder(folder: str, fingerprint: dict[str, Any]) -> tuple[dict[str, str], float | None]:
    """Write an incomplete manifest, or check that the folder's manifest is of this cache.

    Returns the checksum of each file that the manifest lists, and the seconds of the build.
    """
    check_cache_folder(folder)
    if not is_cache(folder):
        write_manifest(folder, fingerprint, None)
    manifest = read_manifest(folder)
    _compare(folder, manifest["fingerprint"], fingerprint)
    return {shard["file"]: shard["sha256"] for shard in manifest["shards"]}, manifest.get("seconds")


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


def check_build(folder: str, args: SEKDConfig, engine: str, workers: int | None) -> None:
    """Check the folder, the settings and the engine of a build, before data and models are loaded.

    Raises:
        ValueError: a folder with another cache or other files, or an engine that cannot work.
    """
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError('--engine ray needs Ray, which is not installed: run `pip install "sekd[ray]"`')
    if workers is not None and (engine != "ray" or workers < 1):
        raise ValueError(f"--num-workers {workers}: it is the number of Ray actors; add --engine ray, and at least 1")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"--output {folder!r} is a file; name a folder for the cache")
    check_cache_folder(folder)
    if is_cache(folder):
        _compare(folder, read_manifest(folder)["fingerprint"], _settings(args))
