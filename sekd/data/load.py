"""Load the rows of local files or of a hub dataset."""

import glob
import os
import textwrap
from collections.abc import Mapping

from datasets import Dataset, IterableDataset, ReadInstruction, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""The ``datasets`` builder of each kind of local file, by its extension."""


def is_local(name: str) -> bool:
    """Whether a dataset's name means local files, and not a dataset of the hub."""
    return os.path.splitext(name)[1] in BUILDERS or os.path.exists(name) or name.startswith((".", "/", "~"))


def find_files(name: str, field: str = "dataset_name") -> list[str]:
    """The local files of a name, sorted: a file, those in a folder and its folders, or those that match a glob.

    Raises:
        ValueError: no such file or folder, nothing readable in it, an empty file, or files of several kinds.
    """
    path = os.path.expanduser(name)
    if os.path.isfile(path):  # brackets in its name are no pattern
        files = [path]
    else:
        pattern = os.path.join(glob.escape(path), "**") if os.path.isdir(path) else path
        files = sorted(glob.glob(pattern, recursive=True))
    files = [f for f in files if os.path.splitext(f)[1] in BUILDERS]
    if not files:
        raise ValueError(f"{field} {name!r}: no such file, or no {', '.join(BUILDERS)} file in it")
    if len({os.path.splitext(f)[1] for f in files}) > 1:
        raise ValueError(f"{field} {name!r} mixes kinds of files; name files of one kind, such as 'folder/*.jsonl'")
    if empty := [f for f in files if not os.path.getsize(f)]:
        raise ValueError(f"{field} {name!r}: {empty[0]} is empty")
    return files


def load_rows(
    name: str, config: str | None = None, split: str = "train", streaming: bool = False, field: str = "dataset_name"
) -> Dataset | IterableDataset:
    """Load the rows of local json, jsonl, csv or parquet files (a file, a folder or a glob), or else of a hub dataset.

    Local files are one split, whatever name ``split`` has; a slice such as ``train[:64]`` or ``train[90%:]`` selects
    from their rows. Several files keep the columns that all of them have. Errors name ``field``.

    Raises:
        ValueError: no such file or folder, nothing readable in it, files of several kinds, or a slice of a stream.
    """
    if not is_local(name):
        try:
            return load_dataset(name, config, split=split, streaming=streaming)
        except (OSError, ValueError) as error:
            reason = textwrap.shorten(str(error), 160, placeholder=" ...")
            raise ValueError(f"{field} {name!r}: no such file or folder; as a dataset of the hub: {reason}") from error
    files = find_files(name, field)
    try:
        kind = BUILDERS[os.path.splitext(files[0])[1]]
        parts = [load_dataset(kind, data_files=glob.escape(f), split="train", streaming=streaming) for f in files]
    except DatasetsError as error:
        cause = error.__cause__ or error
        raise ValueError(f"{field} {name!r} cannot be read as {kind}: {cause}") from error
    if len(parts) > 1:
        from trl.data_utils import get_dataset_column_names

        columns = [
            c for c in get_dataset_column_names(parts[0]) if all(c in get_dataset_column_names(p) for p in parts)
        ]
        parts = [part.select_columns(columns) for part in parts]
    dataset = concatenate_datasets(parts)
    if "[" not in split:
        return dataset
    if streaming:
        raise ValueError(f"split {split!r} slices a stream, whose length is unknown; set dataset_streaming: false")
    return dataset.select([i for _, rows in _find_spans(_local_split(split), {"train": len(dataset)}) for i in rows])


def share_rows(name: str, split: str, other: str, other_split: str, others: Dataset | IterableDataset) -> bool:
    """Whether two splits have rows in common, by the places of the rows in their files or hub dataset.

    ``others`` are the loaded rows of ``other_split``. If both names read a file, but not all their files are the same,
    slices do not count: the answer is True.
    """
    streamed = isinstance(others, IterableDataset)  # no stream is sliced
    if is_local(name) and is_local(other):
        files, other_files = ([os.path.realpath(f) for f in find_files(n)] for n in (name, other))
        if files != other_files or streamed:
            return not {*files}.isdisjoint(other_files)
        sizes, split, other_split = {"train": len(load_rows(name))}, _local_split(split), _local_split(other_split)
    elif name != other:
        return False
    elif streamed:
        return split == other_split
    else:
        sizes = {whole: info.num_examples for whole, info in (others.info.splits or {}).items()}
    spans, other_spans = _find_spans(split, sizes), _find_spans(other_split, sizes)
    return any(
        whole == other_whole and max(rows.start, other_rows.start) < min(rows.stop, other_rows.stop)
        for whole, rows in spans
        for other_whole, other_rows in other_spans
    )


def _local_split(split: str) -> str:
    """A split of local files. They are one split, whatever its name."""
    return "train" + split[split.index("[") :] if "[" in split else "train"


def _find_spans(split: str, sizes: Mapping[str, int]) -> list[tuple[str, range]]:
    """The rows that a split such as ``train[:8]`` selects, by the name of the whole split, which has ``sizes`` rows."""
    spans = ReadInstruction.from_spec("+".join(sizes) if split == "all" else split).to_absolute(dict(sizes))
    return [(s.splitname, range(s.from_ or 0, sizes[s.splitname] if s.to is None else s.to)) for s in spans]
