"""``sekd rollouts``."""

import argparse
from typing import TYPE_CHECKING

from sekd.cli.common import Stopped, WrongInput, add_recipe, reading_input
from sekd.tables import print_facts

if TYPE_CHECKING:
    from sekd.on_policy.generate import RolloutCounts

DESCRIPTION = """\
Generate rollouts of a recipe's student once, before training, and keep them in a file.

The student is the initial one. If sample_fraction is below 1, the prompts are chosen first. Stop it at any time: the
same command resumes. Training on the file needs no engine. With a cache of it, training needs no teacher either.

examples:
  sekd rollouts gsm8k_semi_on_policy_sekd_3x     # this recipe names its file, and its cache
  sekd rollouts gsm8k_on_policy_sekd --output rollouts/gsm8k.jsonl --rollout_engine vllm_server
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.usage = f"{parser.prog} RECIPE [--output FILE] [--round-size N] [--key value ...]"
    parser.description = DESCRIPTION
    parser.add_argument("--output", metavar="FILE", help="a .jsonl file; `rollouts` of the recipe if not given")
    parser.add_argument(
        "--round-size", "--round_size", type=int, metavar="N", help="rollouts that are generated at once; default: 256"
    )


def run(options: argparse.Namespace) -> int:
    from sekd.parse import ROLLOUTS, read_text
    from sekd.recipe import Run

    with reading_input():
        path = options.output or read_text(options.recipe, options.overrides, "rollouts")
        if path is None:
            raise ValueError("there is no file for the rollouts: add --output FILE")
        recipe = Run.parse(options.recipe, options.overrides, ROLLOUTS)
        from rollouts import RolloutConfigError, RolloutError

        try:
            counts = recipe.generate_rollouts(path, options.round_size)
        except RolloutConfigError as error:
            raise WrongInput(str(error)) from error
        except RolloutError as error:
            raise Stopped(f"{error}; the same command resumes") from error
    show_counts(path, counts)
    return 0


def show_counts(path: str, counts: "RolloutCounts") -> None:
    """Print what a file of rollouts holds."""
    total = max(counts.rollouts, 1)
    facts = {
        "rollouts": f"{counts.rollouts:,}",
        "generated tokens": f"{counts.tokens:,}, {counts.tokens / total:.1f} a rollout",
        "cut at max_completion_length": f"{counts.cut:,} ({100 * counts.cut / total:.1f} %)",
        "empty": f"{counts.empty:,}",
    }
    print_facts(f"rollouts in {path}", facts)
