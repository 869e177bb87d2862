"""Shards of encoded samples, memory-mapped, and the manifest that says what they are.

A folder holds ``manifest.json`` and ``shard-00000.arrow`` and so on. A shard is an Arrow file of one record batch: a
key, the number of rows and classes, and the encoded rows of each sample; reading one sample touches its own bytes only.
A shard gets its name when it is whole and synced, so one that is there is complete, whenever the process died.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from sekd.cache.codec import FORM, Decoded, decode
from sekd.files import write_atomically

FORMAT = 2


MANIFEST = "manifest.json"


FINGERPRINT: dict[str, tuple[Any, str]] = {
    "teacher": (dict, "teacher_model_name_or_path, its revision or weights"),
    "dtype": (str, "teacher_dtype"),
    "tokenizer": (str, "the tokenizer or its chat template"),
    "vocab": (int, "the common vocabulary of student and teacher"),
    "data": (
        str,
        "the data (dataset_name, dataset_train_split, sample selection, max_length, packing or the template)",
    ),
    "max_length": (int, "max_length"),
    "packing": (bool, "packing"),
    "class_samples": (int, "class_samples"),
    "temperature": ((int, float), "kd_temperature"),
    "seed": (int, "seed"),
    "teacher_entropy": (bool, "cache_teacher_entropy"),
    "form": (str, "the codec"),
    "shard_samples": (int, "the samples of a shard"),
}
"""What must match for a cache to be the one that is asked for: type, and what a user calls it."""


SHARD = {"samples": int, "rows": int, "classes": int, "bytes": int, "sha256": str}


REBUILD_HINT = "delete it and build (or pull) again"


Encoded = tuple[bytes, int, int, bytes]
"""Of a sample: key, number of rows, number of classes in all rows, bytes."""


SCHEMA = pa.schema([("key", pa.binary(16)), ("rows", pa.int32()), ("classes", pa.int32()), ("data", pa.large_binary())])


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.arrow"


def write_shard(path: str, samples: Sequence[Encoded]) -> None:
    """Write a shard: to another name, synced, then renamed.

    Raises:
        OSError: a full disk, for one, with the file; nothing is left behind.
    """
    columns = zip(*samples, strict=True)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=True)]
    batch = pa.record_batch(arrays, schema=SCHEMA)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            with pa.ipc.new_file(file, SCHEMA) as writer:
                writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        remedy = "make room and run the same command again, it goes on from here"
        raise OSError(error.errno, f"{error.strerror or error}; {remedy}", path) from error
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_shard(path: str) -> pa.RecordBatch:
    """The memory-mapped record batch of a shard.

    Raises:
        ValueError: a missing or damaged file, by its name.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(path))
        batch = reader.get_batch(0)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"cache shard {path!r} cannot be read ({error}); {REBUILD_HINT}") from error
    if batch.schema != SCHEMA:
        raise ValueError(f"cache shard {path!r} has not the columns of this version; {REBUILD_HINT}")
    return batch


def sha256(path: str) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Exclusive use of a folder by one builder; the lock dies with its process (ValueError if another has it)."""
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process builds the cache in {folder!r}; wait for it, or name another folder"
            ) from error
        yield
    finally:
        os.close(handle)


def is_cache(folder: str) -> bool:
    """Whether a folder holds a cache, or the beginning of one."""
    return os.path.exists(os.path.join(folder, MANIFEST))


def read_manifest(folder: str) -> dict[str, Any]:
    """What a cache says of itself.

    Raises:
        ValueError: no cache there, or one of another format.
    """
    path = os.path.join(folder, MANIFEST)
    if not is_cache(folder):
        raise ValueError(f"teacher_cache {folder!r} holds no {MANIFEST}; build it with `sekd cache build RECIPE`")
    try:
        with open(path) as file:
            manifest = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path!r} cannot be read ({error}); {REBUILD_HINT}") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise ValueError(f"{path!r} is not the manifest of a teacher cache; name another folder")
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"teacher_cache {folder!r} has format {manifest['format']}, and this version of sekd reads {FORMAT}; "
            "install the version that wrote it, or build it again"
        )
    if wrong := _what_is_wrong(manifest):
        raise ValueError(f"{path!r}: {wrong}; it was not written by this version of sekd, build the cache again")
    return manifest


def _what_is_wrong(manifest: dict[str, Any]) -> str | None:
    """The first thing in a manifest of this format that :func:`write_manifest` would not have written."""
    found, shards = manifest.get("fingerprint"), manifest.get("shards")
    if not isinstance(manifest.get("complete"), bool) or not isinstance(found, dict) or not isinstance(shards, list):
        return "complete, fingerprint or shards are missing"
    for name, (kind, _) in FINGERPRINT.items():
        if not isinstance(found.get(name), kind) or (kind is int and isinstance(found[name], bool)):
            return f"fingerprint {name} is {found.get(name)!r}"
    if found["form"] != FORM or not {"name", "revision", "weights"} <= found["teacher"].keys():
        return f"fingerprint form {found['form']!r} or teacher {found['teacher']!r} is unknown"
    for number, shard in enumerate(shards):
        if not isinstance(shard, dict) or shard.get("file") != shard_name(number):
            return f"shard {number} is not {shard_name(number)!r}"
        for name, kind in SHARD.items():
            if not isinstance(shard.get(name), kind):
                return f"{shard['file']}: {name} is {shard.get(name)!r}"
    return None


def write_manifest(folder: str, fingerprint: dict[str, Any], shards: list[dict[str, Any]] | None) -> None:
    """Write what the cache is; ``shards`` is None as long as it is not complete."""
    found = {"format": FORMAT, "complete": shards is not None, "fingerprint": fingerprint, "shards": shards or []}
    write_atomically(os.path.join(folder, MANIFEST), json.dumps(found, indent=2) + "\n")


class Store:
    """A complete cache, read by key: only the samples that are asked for are read."""

    def __init__(self, folder: str) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        if not self.manifest["complete"]:
            raise ValueError(f"teacher_cache {folder!r} is not complete; run its `sekd cache build` again, it goes on")
        self.fingerprint: dict[str, Any] = self.manifest["fingerprint"]
        self.shards = []
        self.places: dict[bytes, tuple[int, int]] = {}
        for number, shard in enumerate(self.manifest["shards"]):
            batch = open_shard(folder, shard)
            self.shards.append(batch)
            self.places |= {key: (number, i) for i, key in enumerate(batch.column("key").to_pylist())}

    def total(self, field: str) -> int:
        """Of all shards: ``samples``, ``rows``, ``classes`` or ``bytes``."""
        return sum(shard[field] for shard in self.manifest["shards"])

    def __contains__(self, key: bytes) -> bool:
        return key in self.places

    def read(self, key: bytes) -> Decoded:
        """The rows of a sample.

        Raises:
            ValueError: a damaged sample, with its shard.
        """
        number, place = self.places[key]
        return read_sample(self.shards[number], place, self.manifest["shards"][number]["file"], self.fingerprint)


def open_shard(folder: str, shard: Mapping[str, Any]) -> pa.RecordBatch:
    """A shard that the manifest lists (ValueError if it is missing or of another size)."""
    path = os.path.join(folder, shard["file"])
    if not os.path.exists(path):
        raise ValueError(f"cache shard {path!r} is missing; build (or pull) the cache again, the others stay")
    if os.path.getsize(path) != shard["bytes"]:
        raise ValueError(
            f"cache shard {path!r} has {os.path.getsize(path)} bytes instead of {shard['bytes']}; {REBUILD_HINT}"
        )
    return read_shard(path)


def read_sample(batch: pa.RecordBatch, place: int, name: str, fingerprint: Mapping[str, Any]) -> Decoded:
    """The rows of a sample (ValueError if they are damaged, with the shard's name)."""
    try:
        found = decode(memoryview(batch.column("data")[place].as_buffer()), fingerprint["vocab"])
        if (found.counts.sum(1, dtype=np.int64) != fingerprint["class_samples"]).any():
            raise ValueError("counts do not add up to the draws")
        if (found.entropy is not None) != fingerprint["teacher_entropy"]:
            raise ValueError("its rows have other fields than the manifest says")
    except ValueError as error:
        raise ValueError(f"cache shard {name!r}, sample {place}: {error}; {REBUILD_HINT}") from error
    return found


def verify(folder: str) -> list[str]:
    """What is wrong with a cache: each broken shard by its checksum, size or samples, and samples that are missing."""
    manifest = read_manifest(folder)
    problems, keys = [], []
    for shard in manifest["shards"]:
        try:
            batch = open_shard(folder, shard)
            if sha256(os.path.join(folder, shard["file"])) != shard["sha256"]:
                raise ValueError(f"{shard['file']}: the checksum differs; {REBUILD_HINT}")
            for place in range(batch.num_rows):
                read_sample(batch, place, shard["file"], manifest["fingerprint"])
            keys += batch.column("key").to_pylist()
        except ValueError as error:
            problems.append(str(error))
    if not manifest["complete"]:
        problems.append(f"{MANIFEST}: the cache is not complete; run its `sekd cache build` again, it goes on")
    elif not problems and name_samples(keys) != manifest["fingerprint"]["data"]:
        problems.append(f"{MANIFEST}: it lists other samples than it was built from; build (or pull) again")
    return problems


def name_samples(keys: Iterable[bytes]) -> str:
    """A name of a set of samples, whatever their order; one that repeats counts once."""
    return hashlib.blake2b(b"".join(sorted(set(keys))), digest_size=16).hexdigest()
