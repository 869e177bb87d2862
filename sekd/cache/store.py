"""Shards of encoded samples, memory-mapped, and the manifest that describes them.

A folder holds ``manifest.json``, ``shard-00000.arrow``, ``shard-00001.arrow`` and so on. A shard is an Arrow file with
one record batch. For each sample it has a key, the numbers of positions and classes, and the encoded positions. Reading
a sample touches only the bytes of that sample. A shard gets its name after it is written and synced: a file with such a
name is complete, whenever the process died.

Format 2 stores the number of positions as ``rows``, in the shards and in the manifest. The name stays, so that existing
caches can be read.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sekd.cache.codec import Decoded, decode
from sekd.files import DamagedFile, write_atomically
from sekd.fingerprints import DATED_TEMPLATE

FORMAT = 2
FORM = "compressed"
"""The form of the encoded samples. There is one form, and the manifest names it."""

MANIFEST = "manifest.json"

OWN_FILES = r"(manifest\.json|shard-\d{5,}\.arrow)(\.tmp)?"
"""The names of a cache's files, temporary ones included."""

FINGERPRINT: dict[str, tuple[Any, str]] = {
    "teacher": (dict, "teacher_model_name_or_path, its revision or weights"),
    "dtype": (str, "teacher_dtype"),
    "tokenizer": (str, "the tokenizer or its chat template"),
    "vocab": (int, "the common vocabulary of student and teacher"),
    "data": (
        str,
        "the data (dataset_name, dataset_train_split, sample selection, max_length, packing or the template; "
        f"{DATED_TEMPLATE})",
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
"""The entries of a manifest's fingerprint, which must equal the recipe's: their type, and how errors name them."""

SHARD = {"samples": int, "rows": int, "classes": int, "bytes": int, "sha256": str}
"""The entries of a shard in the manifest, besides its file name; "rows" is its number of positions."""

REBUILD_HINT = "delete it and build (or pull) again"

Encoded = tuple[bytes, int, int, bytes]
"""A sample: its key, its number of positions, its number of classes over all positions, and its bytes."""

SCHEMA = pa.schema([("key", pa.binary(16)), ("rows", pa.int32()), ("classes", pa.int32()), ("data", pa.large_binary())])


def name_shard(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:05d}.arrow"


def write_shard(path: str, samples: Sequence[Encoded]) -> None:
    """Write a shard under a temporary name, sync it, then rename it.

    Raises:
        OSError: the file cannot be written, for example on a full disk. The temporary file is removed.
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
        hint = "make room and run the same command again, which resumes the build"
        raise OSError(error.errno, f"{error.strerror or error}; {hint}", path) from error
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_shard(path: str) -> pa.RecordBatch:
    """Memory-map a shard; its record batch.

    Raises:
        DamagedFile: a missing or damaged file; the error names it.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(path))
        batch = reader.get_batch(0)
        batch.validate(full=True)  # a wrong offset would read outside of the file
    except (OSError, pa.ArrowException) as error:
        cause = " ".join(str(error).split())
        raise DamagedFile(f"cache shard {path!r} cannot be read ({cause}); {REBUILD_HINT}") from error
    if batch.schema != SCHEMA:
        raise DamagedFile(f"cache shard {path!r} does not have the columns of this version; {REBUILD_HINT}")
    return batch


def hash_file(path: str) -> str:
    """The SHA-256 of a file, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_cache(folder: str) -> bool:
    """Whether a folder holds a cache, complete or not."""
    return os.path.exists(os.path.join(folder, MANIFEST))


def check_cache_folder(folder: str) -> None:
    """Check that a folder, if it exists and holds no cache yet, holds no other files either.

    Shards and temporary files of an earlier build may be there.

    Raises:
        ValueError: other files; the error names some.
    """
    if is_cache(folder) or not os.path.isdir(folder):
        return
    others = [name for name in sorted(os.listdir(folder)) if not re.fullmatch(OWN_FILES, name)]
    if others:
        raise ValueError(
            f"the folder {folder!r} is to be a cache, but holds other files ({', '.join(map(repr, others[:3]))}); name "
            "an empty or a new folder"
        )


def read_manifest(folder: str) -> dict[str, Any]:
    """The manifest of a cache: format, complete, seconds (of its build, if it has them), fingerprint and shards.

    Raises:
        ValueError: no cache in the folder, a cache of another format, or an invalid manifest.
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
            "install the version of sekd that wrote it, or build the cache again"
        )
    if problem := _find_problem(manifest):
        raise ValueError(f"{path!r}: {problem}; this version of sekd did not write it, so build the cache again")
    return manifest


def _find_problem(manifest: dict[str, Any]) -> str | None:
    """The first entry of a manifest that :func:`write_manifest` would not have written, or None."""
    fingerprint, shards, complete = (manifest.get(name) for name in ("fingerprint", "shards", "complete"))
    if not isinstance(complete, bool) or not isinstance(fingerprint, dict) or not isinstance(shards, list):
        return "complete, fingerprint or shards are missing"
    if not isinstance(manifest.get("seconds"), int | float | None):
        return f"seconds is {manifest['seconds']!r}"
    for name, (kind, _) in FINGERPRINT.items():
        value = fingerprint.get(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            return f"fingerprint {name} is {value!r}"
    form, teacher = fingerprint["form"], fingerprint["teacher"]
    if form != FORM or not {"name", "revision", "weights"} <= teacher.keys():
        return f"fingerprint form {form!r} or teacher {teacher!r} is unknown"
    for number, shard in enumerate(shards):
        if not isinstance(shard, dict) or shard.get("file") != name_shard(number):
            return f"shard {number} is not {name_shard(number)!r}"
        for name, kind in SHARD.items():
            if not isinstance(shard.get(name), kind):
                return f"{shard['file']}: {name} is {shard.get(name)!r}"
    return None


def write_manifest(
    folder: str, fingerprint: dict[str, Any], shards: list[dict[str, Any]] | None, seconds: float | None = None
) -> None:
    """Write a manifest; ``shards`` is None while the cache is not complete.

    ``seconds`` is the time of a build, None if it is unknown.
    """
    manifest = {
        "format": FORMAT,
        "complete": shards is not None,
        "seconds": seconds,
        "fingerprint": fingerprint,
        "shards": shards or [],
    }
    write_atomically(os.path.join(folder, MANIFEST), json.dumps(manifest, indent=2) + "\n")


class Store:
    """A complete cache. Samples are read by key, and nothing else is read.

    ``places[key]`` holds a sample's shard and its index in that shard.

    Raises:
        ValueError: no cache in the folder, an incomplete one, or a missing or damaged shard.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        if not self.manifest["complete"]:
            raise ValueError(f"teacher_cache {folder!r} is not complete; run its `sekd cache build` again to resume it")
        self.fingerprint: dict[str, Any] = self.manifest["fingerprint"]
        self.shards = []
        self.places: dict[bytes, tuple[int, int]] = {}
        for number, shard in enumerate(self.manifest["shards"]):
            batch = open_shard(folder, shard)
            self.shards.append(batch)
            self.places |= {key: (number, i) for i, key in enumerate(batch.column("key").to_pylist())}

    def total(self, field: str) -> int:
        """The sum over all shards of ``samples``, ``rows`` (positions), ``classes`` or ``bytes``."""
        return sum(shard[field] for shard in self.manifest["shards"])

    def __contains__(self, key: bytes) -> bool:
        return key in self.places

    def read(self, key: bytes) -> Decoded:
        """The positions of a sample.

        Raises:
            DamagedFile: a damaged sample; the error names its shard.
        """
        number, place = self.places[key]
        path = os.path.join(self.folder, self.manifest["shards"][number]["file"])
        return read_sample(self.shards[number], place, path, self.fingerprint)


def open_shard(folder: str, shard: Mapping[str, Any]) -> pa.RecordBatch:
    """Memory-map a shard that the manifest lists.

    Raises:
        DamagedFile: a shard that is missing, damaged, or of another size.
    """
    path = os.path.join(folder, shard["file"])
    if not os.path.exists(path):
        raise DamagedFile(f"cache shard {path!r} is missing; build (or pull) the cache again, which keeps the others")
    if os.path.getsize(path) != shard["bytes"]:
        raise DamagedFile(
            f"cache shard {path!r} has {os.path.getsize(path)} bytes instead of {shard['bytes']}; {REBUILD_HINT}"
        )
    return read_shard(path)


def read_sample(batch: pa.RecordBatch, place: int, path: str, fingerprint: Mapping[str, Any]) -> Decoded:
    """The positions of the sample at index ``place`` of the shard in ``path``.

    Raises:
        DamagedFile: a damaged sample; the error names its shard.
    """
    try:
        sample = decode(memoryview(batch.column("data")[place].as_buffer()), fingerprint["vocab"])
        if (sample.counts.sum(1, dtype=np.int64) != fingerprint["class_samples"]).any():
            raise ValueError("counts do not add up to the number of draws")
        if (sample.entropy is not None) != fingerprint["teacher_entropy"]:
            raise ValueError("the manifest and the sample disagree on whether teacher entropy is kept")
    except (ValueError, OSError) as error:  # OSError: zstd cannot read the bytes
        raise DamagedFile(f"cache shard {path!r}, sample {place}: {error}; {REBUILD_HINT}") from error
    return sample


def verify(folder: str) -> list[str]:
    """The problems of a cache, one text each; none if it is intact.

    A shard is checked by its size, its checksum and its decoded samples. All shards together must hold the samples that
    the cache was built from.

    Raises:
        ValueError: as :func:`read_manifest`.
    """
    manifest = read_manifest(folder)
    problems, keys = [], []
    for shard in manifest["shards"]:
        path = os.path.join(folder, shard["file"])
        try:
            batch = open_shard(folder, shard)
            if hash_file(path) != shard["sha256"]:
                raise DamagedFile(f"{shard['file']}: the checksum differs; {REBUILD_HINT}")
            for place in range(batch.num_rows):
                read_sample(batch, place, path, manifest["fingerprint"])
            keys += batch.column("key").to_pylist()
        except DamagedFile as error:
            problems.append(str(error))
    if not manifest["complete"]:
        problems.append(f"{MANIFEST}: the cache is not complete; run its `sekd cache build` again to resume it")
    elif not problems and name_samples(keys) != manifest["fingerprint"]["data"]:
        problems.append(
            f"{MANIFEST}: the shards hold other samples than the cache was built from; build (or pull) again"
        )
    return problems


def name_samples(keys: Iterable[bytes]) -> str:
    """A name for a set of samples, by their keys: neither their order nor repeated samples change it."""
    return hashlib.blake2b(b"".join(sorted(set(keys))), digest_size=16).hexdigest()
