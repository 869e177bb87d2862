"""``sekd cache``."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sekd.cli.common import add_recipe, reading_input

DESCRIPTION = """\
Pay for the teacher once: keep a few sampled classes of each position, and train students from them without a teacher.

examples:
  sekd cache build fineweb_edu_sekd --output caches/fineweb --sample_pool 50000 --sample_fraction 0.2
  sekd train fineweb_edu_sekd --teacher_cache caches/fineweb --sample_pool 50000 --sample_fraction 0.2
  sekd cache info --plan --positions 100e9 --vocab 100000 --draws 64 --sample-fraction 0.2

`sekd cache ACTION --help` shows the options of an action.
"""
BUILD = """\
Let the teacher read every kept sample once. Stop it at any time: the same command resumes. The keys of a recipe are
those of `sekd train --help`.

examples:
  sekd cache build fineweb_edu_sekd --output caches/fineweb --sample_pool 50000 --sample_fraction 0.2
  RAY_ADDRESS=auto sekd cache build my_recipe.yaml --output caches/mine --engine ray --num-workers 8
"""
INFO = """\
Show what a cache holds: samples, positions, bytes a position, and what it was built from. With --plan, show what a
cache would take on disk; numbers that are not given come from the cache or recipe.

examples:
  sekd cache info caches/fineweb
  sekd cache info --plan my_recipe.yaml --positions 80e6
  sekd cache info --plan --positions 100e9 --vocab 100000 --draws 64 --sample-fraction 0.2
"""
VERIFY = """\
Compare every checksum and decode every sample; the exit status is 2 if a shard is broken.

example:
  sekd cache verify caches/fineweb
"""
PUSH = """\
Upload a cache to the Hugging Face hub, as a dataset repository.

example:
  sekd cache push caches/fineweb my-name/fineweb-cache --private
"""
PULL = """\
Download a cache from the Hugging Face hub, and check every byte.

example:
  sekd cache pull my-name/fineweb-cache caches/fineweb
"""


def add_build(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.usage = f"{parser.prog} RECIPE --output DIR [--engine ray] [--num-workers N] [--key value ...]"
    parser.add_argument("--output", metavar="DIR", help="folder of the cache; teacher_cache of the recipe if not given")
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="read here, or in Ray actors")
    parser.add_argument(
        "--num-workers", "--num_workers", type=int, metavar="N", help="Ray actors (RAY_ADDRESS names a cluster)"
    )


def run_build(options: argparse.Namespace) -> int:
    from sekd.parse import CACHE
    from sekd.recipe import Run

    overrides = options.overrides
    if options.output is not None:
        overrides = [*overrides, "--teacher_cache", options.output]
    with reading_input():
        run = Run.parse(options.recipe, overrides, CACHE)
        from sekd.cache.info import show_cache

        show_cache(run.build_cache(options.engine, options.num_workers))
    return 0


def add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="DIR|RECIPE", help="a cache's folder; with --plan a recipe too")
    parser.add_argument("--plan", action="store_true", help="show what a cache would take")
    parser.add_argument("--positions", type=float, help="positions of all samples, before sample selection")
    parser.add_argument("--vocab", type=int, help="classes that teacher and student share")
    parser.add_argument("--draws", type=int, help="class_samples")
    parser.add_argument("--sample-fraction", "--sample_fraction", type=float, help="share of the samples, in (0, 1]")


def run_info(options: argparse.Namespace) -> int:
    from sekd.cache.info import measure_cache, show_cache, show_plan
    from sekd.cache.store import Store, is_cache
    from sekd.recipe import Run

    numbers = {"positions": options.positions, "vocab": options.vocab, "draws": options.draws}
    given = {k: v for k, v in (numbers | {"fraction": options.sample_fraction}).items() if v is not None}
    with reading_input():
        if not options.plan:
            if options.name is None or given:
                raise ValueError("name a cache's folder, or add --plan to see what a cache would take")
            if os.path.isfile(options.name):
                raise ValueError(
                    f"{options.name!r} is a file, not a cache's folder; add --plan for what a recipe would take"
                )
            show_cache(Store(options.name))
            return 0
        known: dict[str, Any] = {"fraction": 1.0}
        if options.name is not None:
            known |= measure_cache(options.name) if is_cache(options.name) else Run.parse(options.name).plan(given)
        if missing := {"positions", "vocab", "draws"} - (known | given).keys():
            raise ValueError(f"the plan needs --{' and --'.join(sorted(missing))}, or a cache or recipe that says so")
        show_plan(**known | given)
    return 0


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a cache's folder")


def run_verify(options: argparse.Namespace) -> int:
    from sekd.cache.store import read_manifest, verify

    folder = options.folder
    with reading_input():
        shards = read_manifest(folder)["shards"]
        problems = verify(folder)
    for problem in problems:
        print(f"sekd: {problem}", file=sys.stderr)
    print(f"{folder}: {len(shards)} shards, {sum(s['samples'] for s in shards):,} samples, {len(problems)} broken")
    return 2 if problems else 0


def add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a cache's folder")
    parser.add_argument("repo", metavar="REPO", help="hub id of the dataset repository, made if it is missing")
    parser.add_argument("--private", action="store_true", help="make the repository private")


def run_push(options: argparse.Namespace) -> int:
    from sekd.cache.hub import push

    with reading_input():
        print(f"the cache is at {push(options.folder, options.repo, options.private)}")
    return 0


def add_pull(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="REPO", help="hub id of the dataset repository")
    parser.add_argument("folder", metavar="DIR", help="folder to download to")
    parser.add_argument("--revision", help="branch, tag or commit")


def run_pull(options: argparse.Namespace) -> int:
    from sekd.cache.hub import pull
    from sekd.cache.info import show_cache

    with reading_input():
        show_cache(pull(options.repo, options.folder, options.revision))
    return 0


@dataclass(frozen=True)
class Action:
    """One action of ``sekd cache``."""

    summary: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


ACTIONS = {
    "build": Action("let the teacher read the samples of a recipe", BUILD, add_build, run_build),
    "info": Action("what a cache holds, or what one would take", INFO, add_info, run_info),
    "verify": Action("check every byte", VERIFY, add_verify, run_verify),
    "push": Action("upload to the Hugging Face hub", PUSH, add_push, run_push),
    "pull": Action("download from the Hugging Face hub", PULL, add_pull, run_pull),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, action in ACTIONS.items():
        action.add_arguments(
            actions.add_parser(
                name,
                help=action.summary,
                description=action.description,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
        )


def run(options: argparse.Namespace) -> int:
    return ACTIONS[options.action].run(options)
