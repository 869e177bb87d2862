"""Load the rows of local files or of a hub dataset."""

import glob
import os
import textwrap

from datasets import Dataset, IterableDataset, ReadInstruction, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""The ``datasets`` builder of each kind of local file, by its extension."""


def is_local(name: str) -> bool:
    """Whether a dataset's name means local files, and not a dataset of the hub."""
    return os.path.splitext(name)[1] in BUILDERS or os.path.exists(name) or name.startswith((".", "/", "~"))


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
    path = os.path.expanduser(name)
    pattern = os.path.join(path, "**") if os.path.isdir(path) else path
    files = sorted(f for f in glob.glob(pattern, recursive=True) if os.path.splitext(f)[1] in BUILDERS)
    if not files:
        raise ValueError(f"{field} {name!r}: no such file, or no {', '.join(BUILDERS)} file in it")
    if len({os.path.splitext(f)[1] for f in files}) > 1:
        raise ValueError(f"{field} {name!r} mixes kinds of files; name files of one kind, such as 'folder/*.jsonl'")
    if empty := [f for f in files if not os.path.getsize(f)]:
        raise ValueError(f"{field} {name!r}: {empty[0]} is empty")
    try:
        kind = BUILDERS[os.path.splitext(files[0])[1]]
        parts = [load_dataset(kind, data_files=f, split="train", streaming=streaming) for f in files]
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
    spans = ReadInstruction.from_spec("train" + split[split.index("[") :]).to_absolute({"train": len(dataset)})
    return dataset.select(
        [i for span in spans for i in range(span.from_ or 0, len(dataset) if span.to is None else span.to)]
    )
