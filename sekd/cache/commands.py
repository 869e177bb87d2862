"""``sekd cache``: its commands. What they need is imported when they run."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sekd.cli import build_cache_of, plan_of, reading_input

CACHE_HELP = """\
Pay for the teacher once: keep a few sampled classes of each position, and train students from them without a teacher.

  build RECIPE --output DIR   the teacher reads every kept sample; stop it anywhere, the same command goes on.
                              --engine ray --num-workers N reads in N Ray actors (RAY_ADDRESS names a cluster)
  info DIR                    samples, rows, bytes a row, what it was built from
  info --plan [DIR|RECIPE]    what a cache would take on disk, for --positions, --vocab, --draws and
                              --sample-fraction; what is left out comes from the cache or recipe
  verify DIR                  checksums, and decodes everything
  push DIR REPO [--private]   to the Hugging Face hub, as a dataset repository
  pull REPO DIR               from there, and checks every byte

example:
  sekd cache build recipes/fineweb_edu_sekd.yaml --output caches/fineweb --sample_pool 50000 --sample_fraction 0.2
  sekd train recipes/fineweb_edu_sekd.yaml --teacher_cache caches/fineweb --sample_pool 50000 --sample_fraction 0.2
  sekd cache info --plan --positions 100e9 --vocab 100000 --draws 64 --sample-fraction 0.2
"""


def cache_build(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """``sekd cache build``."""
    from sekd.cache.info import show_cache

    parser.add_argument("recipe")
    parser.add_argument("--output")
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--num-workers", "--num_workers", type=int)
    found, overrides = parser.parse_known_args(argv)
    if found.output is not None:
        overrides += ["--teacher_cache", found.output]
    with reading_input():
        show_cache(build_cache_of(found.recipe, overrides, found.engine, found.num_workers))
    return 0


def cache_info(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """``sekd cache info``."""
    from sekd.cache.info import measure_cache, show_cache, show_plan
    from sekd.cache.store import Store, is_cache

    parser.add_argument("what", nargs="?", metavar="DIR|RECIPE")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--positions", type=float)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--draws", type=int)
    parser.add_argument("--sample-fraction", "--sample_fraction", type=float)
    found = parser.parse_args(argv)
    given = {"positions": found.positions, "vocab": found.vocab, "draws": found.draws}
    given = {k: v for k, v in (given | {"fraction": found.sample_fraction}).items() if v is not None}
    with reading_input():
        if not found.plan:
            if found.what is None or given:
                raise ValueError("name a cache's folder, or add --plan to see what one would take")
            if os.path.isfile(found.what):
                raise ValueError(
                    f"{found.what!r} is a file, not a cache's folder; add --plan for what a recipe would take"
                )
            show_cache(Store(found.what))
            return 0
        known: dict[str, Any] = {"fraction": 1.0}
        if found.what is not None:
            known |= measure_cache(found.what) if is_cache(found.what) else plan_of(found.what, given)
        if missing := {"positions", "vocab", "draws"} - (known | given).keys():
            raise ValueError(f"the plan needs --{' and --'.join(sorted(missing))}, or a cache or recipe that says so")
        show_plan(**known | given)
    return 0


def cache_verify(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """``sekd cache verify``."""
    from sekd.cache.store import read_manifest, verify

    parser.add_argument("folder")
    folder = parser.parse_args(argv).folder
    with reading_input():
        shards = read_manifest(folder)["shards"]
        problems = verify(folder)
    for problem in problems:
        print(f"sekd: {problem}", file=sys.stderr)
    print(f"{folder}: {len(shards)} shards, {sum(s['samples'] for s in shards):,} samples, {len(problems)} broken")
    return 2 if problems else 0


def cache_push(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """``sekd cache push``."""
    from sekd.cache.hub import push

    parser.add_argument("folder")
    parser.add_argument("repo")
    parser.add_argument("--private", action="store_true")
    found = parser.parse_args(argv)
    with reading_input():
        print(f"the cache is at {push(found.folder, found.repo, found.private)}")
    return 0


def cache_pull(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """``sekd cache pull``."""
    from sekd.cache.hub import pull
    from sekd.cache.info import show_cache

    parser.add_argument("repo")
    parser.add_argument("folder")
    parser.add_argument("--revision")
    found = parser.parse_args(argv)
    with reading_input():
        show_cache(pull(found.repo, found.folder, found.revision))
    return 0


CACHE_ACTIONS: dict[str, Callable[[argparse.ArgumentParser, Sequence[str]], int]] = {
    "build": cache_build,
    "info": cache_info,
    "verify": cache_verify,
    "push": cache_push,
    "pull": cache_pull,
}
