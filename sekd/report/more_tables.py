"""Tables of what several runs show together: budgets, chosen samples, and caches."""

import os
import re
from collections.abc import Sequence

from sekd.cache.store import Store
from sekd.files import DamagedFile, read_checked
from sekd.report.read import RunRecord, SweepRecord
from sekd.report.tables import ReportTable, TableCell
from sekd.sweep.table import format_cell

SHARE = re.compile(r"\s*\d+(\.\d+)?\s*%")
"""A budget in the name of a method."""


def make_more_tables(runs: Sequence[RunRecord], sweeps: Sequence[SweepRecord]) -> list[ReportTable]:
    """The tables that these runs give, perhaps none."""
    tables = [_make_budgets(sweep, runs) for sweep in sweeps]
    tables += [_make_overlaps(runs), _make_caches(runs)]
    return [table for table in tables if table is not None]


def _make_budgets(sweep: SweepRecord, runs: Sequence[RunRecord]) -> ReportTable | None:
    """A method in a row, a share of the positions in a column (arXiv 2602.01395, figures 2 and 3)."""
    if sweep.main is None:
        return None
    fractions = {run.folder: run.keys.get("position_fraction") for run in runs}
    families: dict[str, dict[float, str]] = {}
    for line in sweep.lines:
        paths = [os.path.join(sweep.folder, name) for name in line.folders]
        fraction = next((fractions[path] for path in paths if path in fractions), None)
        if isinstance(fraction, int | float) and SHARE.search(line.method):
            cell = format_cell(sweep.kinds[sweep.main], line.cells.get(sweep.main))
            families.setdefault(SHARE.sub("", line.method), {})[fraction] = cell
    families = {name: cells for name, cells in families.items() if len(cells) > 1}
    if not families:
        return None
    shares = sorted({fraction for cells in families.values() for fraction in cells})
    rows = [
        [TableCell(name), *(TableCell(cells.get(share, "")) for share in shares)] for name, cells in families.items()
    ]
    note = "Mean ± standard deviation over seeds, and the difference to the baseline in brackets."
    return ReportTable(
        f"{sweep.main} by share of the positions", note, ["method", *(f"{100 * share:g} %" for share in shares)], rows
    )


def _make_overlaps(runs: Sequence[RunRecord]) -> ReportTable | None:
    """Which samples do scores agree on (arXiv 2602.01395, figure 7)?"""
    kept = {}
    for run in runs:
        path = run.keys.get("samples_file") or os.path.join(run.folder, "samples.json")
        try:
            kept[run.group] = {*read_checked(path)["kept"]}
        except (OSError, DamagedFile, KeyError, TypeError):
            continue
    if len(kept) < 2:
        return None
    smaller = {(a, b): max(1, min(len(kept[a]), len(kept[b]))) for a in kept for b in kept}
    rows = [[TableCell(a), *(TableCell(f"{len(kept[a] & kept[b]) / smaller[a, b]:.0%}") for b in kept)] for a in kept]
    return ReportTable("Samples that both runs keep", "Of the samples of the smaller choice.", ["", *kept], rows)


def _make_caches(runs: Sequence[RunRecord]) -> ReportTable | None:
    """What the caches of the runs take on disk (arXiv 2602.01395, table 6)."""
    rows = list[list[TableCell]]()
    for folder in dict.fromkeys(str(run.keys["teacher_cache"]) for run in runs if run.keys.get("teacher_cache")):
        try:
            store = Store(folder)
        except (OSError, ValueError):
            continue
        positions, size, classes = (store.total(name) for name in ("rows", "bytes", "classes"))
        logits = 2 * store.fingerprint["vocab"]
        rows.append(
            [
                TableCell(folder),
                TableCell(f"{store.total('samples'):,}"),
                TableCell(f"{positions:,}"),
                TableCell(f"{size / 1e6:,.2f}"),
                TableCell(f"{size / max(positions, 1):.1f}"),
                TableCell(f"{classes / max(positions, 1):.1f}"),
                TableCell(f"{logits:,}"),
            ]
        )
    header = ["cache", "samples", "positions", "MB", "bytes a position", "classes a position", "bytes of fp16 logits"]
    note = "fp16 logits: 2 bytes a class of the vocabulary."
    return ReportTable("Teacher caches", note, header, rows) if rows else None
