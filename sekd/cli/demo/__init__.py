"""``sekd demo``."""

import argparse

DESCRIPTION = """\
Run the main job from nothing, without any download: generate arithmetic word problems, train a tiny teacher, and
distil it on-policy through vLLM into a smaller student, once at 20 % of the positions and once at all positions.

example:
  sekd demo --seed 7 --output_dir runs/demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--output_dir", default="runs/demo", help="folder of the data and all models (runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="of the problems, the models and the training (0)")


def run(options: argparse.Namespace) -> int:
    from sekd.cli.demo.pipeline import run_demo

    run_demo(options.output_dir, options.seed)
    return 0
