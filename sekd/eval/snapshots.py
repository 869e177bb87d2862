"""Files that keep which positions a student would have chosen of a few sequences, after some steps.

A run writes them into ``output_dir/selection``, and a report reads them. Each is a safetensors file.
"""

import glob
import json
import os
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sekd.files import DamagedFile, write_atomically

FOLDER = "selection"
VERSION = 1
NUMBERS = ("student_entropy", "student_ce", "teacher_entropy", "forward_kl", "reverse_kl")
"""The numbers in nats that are kept of each position, in float16."""


COLUMNS = (
    *NUMBERS,
    *("weight", "scores", "student_ids", "student_probs", "teacher_ids", "teacher_probs", "sample", "position"),
)
"""All columns of a file."""


@dataclass(frozen=True)
class Snapshot:
    """What a run kept at one step.

    Attributes:
        step: the number of optimizer steps before it.
        source: where the sequences come from, for a reader.
        scores: the names of the scores.
        samples: the fields of each sequence, a :class:`sekd.data.batch.Sample`.
        texts: the text of each token id that occurs.
        columns: what :func:`sekd.eval.selection.measure_selection` gives of each valid position; and ``sample``, the
            sequence's place in ``samples``, and ``position``, the place of the token before the predicted one.
    """

    step: int
    source: str
    scores: list[str]
    samples: list[dict[str, Any]]
    texts: dict[int, str]
    columns: dict[str, Tensor]

    def get_text(self, token: int) -> str:
        """The text of a token id."""
        return self.texts.get(token, f"⟨{token}⟩")

    def find_rows(self, place: int) -> Tensor:
        """The rows of the columns that belong to the sequence at a place in ``samples``."""
        return (self.columns["sample"] == place).nonzero()[:, 0]


def write_snapshot(folder: str, snapshot: Snapshot) -> None:
    """Write a snapshot into a folder, whole or not at all."""
    facts = {name: value for name, value in vars(snapshot).items() if name != "columns"}
    content = save(dict(snapshot.columns), {"sekd": json.dumps({**facts, "version": VERSION})})
    write_atomically(os.path.join(folder, f"{snapshot.step:07}.safetensors"), content)


def read_snapshot(path: str) -> Snapshot:
    """The snapshot in a file.

    Raises:
        DamagedFile: the file is damaged, or another version of sekd wrote it.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["sekd"])
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if (version := facts.pop("version")) == VERSION:
            texts = {int(token): str(text) for token, text in facts.pop("texts").items()}
            snapshot = Snapshot(**facts, texts=texts, columns=columns)
            lengths = {len(snapshot.columns[name]) for name in COLUMNS}
            if len(lengths) == 1 and all(sample["input_ids"] for sample in snapshot.samples):
                return snapshot
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"{path!r} is damaged: {error!r}") from error
    if version != VERSION:
        raise DamagedFile(f"{path!r} was written by another version of sekd (its format is {version}, not {VERSION})")
    raise DamagedFile(f"{path!r} is damaged: its columns differ in length")


def list_snapshots(folder: str) -> dict[int, str]:
    """The paths of the snapshots in a folder, by step."""
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
    return {int(name): path for path in paths if (name := os.path.basename(path).split(".")[0]).isdecimal()}
