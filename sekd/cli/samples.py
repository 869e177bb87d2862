"""``sekd samples``."""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from sekd.cli.common import add_recipe, reading_input
from sekd.tables import print_table

DESCRIPTION = """\
Score every sample of a recipe once, with the models as they are before training, and keep the best.

Writes samples_file (samples.json in output_dir): the ids that sample_fraction keeps, all scores, and a fingerprint of
data, tokenizer and models. `sekd train` with the same recipe uses this file, or makes it if it is missing. The teacher
is loaded only if sample_score needs it. The keys of a recipe are those of `sekd train --help`.

example:
  sekd samples fineweb_edu_sekd_3x --sample_fraction 0.2 --sample_pool 50000
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.description = DESCRIPTION


def run(options: argparse.Namespace) -> int:
    from sekd.recipe import Run

    with reading_input():
        recipe = Run.parse(options.recipe, options.overrides)
        choice = recipe.choose_samples()
    if recipe.args.process_index == 0:
        from sekd.samples import samples_path

        show_samples(choice, recipe.args.sample_score)
        print(f"the choice is in {samples_path(recipe.args)}")
    return 0


def show_samples(choice: dict[str, Any], score: str) -> None:
    """Print how many samples were kept, and the range of their scores."""
    scores: list[float] = choice["scores"]
    kept = {*choice["kept"]}
    table = Table(title=f"samples by {score.replace('_', ' ')}", title_justify="left")
    for column in ("", "samples", "lowest", "median", "highest"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("all", *_summarize(scores))
    table.add_row("kept", *_summarize([value for i, value in enumerate(scores) if i in kept]))
    table.add_row("left out", *_summarize([value for i, value in enumerate(scores) if i not in kept]))
    print_table(table)


def _summarize(scores: Sequence[float]) -> list[str]:
    values = [min(scores), statistics.median_low(scores), max(scores)] if scores else []
    return [f"{len(scores):,}", *(f"{value:.4g}" for value in values)]
