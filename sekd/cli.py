"""The ``sekd`` command: the only place where a recipe becomes objects."""

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NoReturn

import yaml

TRAIN_HELP = """\
Distil a teacher into a student as a recipe says.

A recipe is flat YAML. Its keys are the fields below, those of transformers' TrainingArguments, and those of TRL's
ScriptArguments and ModelConfig (model_name_or_path, dtype, use_peft, lora_r, load_in_4bit, ...). Every key can be
given on the command line too, and beats the file there.

example:
  sekd train recipes/gsm8k_on_policy_sekd.yaml --max_steps 100 --learning_rate 2e-6

The output folder gets the student, its tokenizer, recipe.yaml (as run), versions.json and metrics.jsonl.
--resume_from_checkpoint true goes on from the last checkpoint there.
"""
SAMPLES_HELP = """\
Score every sample of a recipe once, with the models as they are before training, and keep the best.

Writes samples_file (samples.json in output_dir): the ids that sample_fraction keeps, all scores, and a fingerprint of
data, tokenizer and models. `sekd train` with the same recipe uses it, or makes it if it is not there. Only the student
is loaded where sample_score does not need the teacher.

example:
  sekd samples recipes/fineweb_edu_sekd.yaml --sample_fraction 0.2 --sample_pool 50000
"""
DEMO_HELP = """\
Run the main job on an embedded default, without any download: write arithmetic word problems, train a tiny teacher,
and distil it on-policy through vLLM into a smaller student, once at 20 % of the positions and once at all.

example:
  sekd demo --seed 7 --output_dir runs/demo
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 (training stopped), 2 (a wrong input) or 130 (Ctrl-C)."""
    from sekd.cache.commands import CACHE_ACTIONS, CACHE_HELP

    parser = argparse.ArgumentParser(prog="sekd", description="Selective knowledge distillation of language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    train = commands.add_parser("train", help="distil as a recipe says", description=TRAIN_HELP, formatter_class=raw)
    samples = commands.add_parser(
        "samples", help="choose the samples to train on", description=SAMPLES_HELP, formatter_class=raw
    )
    for command in (train, samples):
        command.add_argument("recipe", help="a YAML file, for example one of recipes/")
        command.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--key value", help="beats the recipe")
    cache = commands.add_parser(
        "cache", help="an offline cache of a teacher", description=CACHE_HELP, formatter_class=raw
    )
    cache.add_argument("action", choices=CACHE_ACTIONS)
    cache.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="as above")
    demo = commands.add_parser("demo", help="the main job in 5 minutes", description=DEMO_HELP, formatter_class=raw)
    demo.add_argument("--output_dir", default="runs/demo")
    demo.add_argument("--seed", type=int, default=0)
    if argv is None:
        argv = sys.argv[1:]
    if [*argv][:1] in (["train"], ["samples"]) and {"-h", "--help"} & {*argv}:
        train.epilog = samples.epilog = _field_help()
    options = parser.parse_args(argv)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels at every import
    try:
        return COMMANDS[options.command](options)
    except KeyboardInterrupt:
        print("sekd: stopped", file=sys.stderr)
        return 130
    except (_WrongInput, _Stopped, FloatingPointError) as error:
        print(f"sekd: {error}", file=sys.stderr)
        return 2 if isinstance(error, _WrongInput) else 1


class _WrongInput(Exception):
    """What a user gave cannot work; the message says why."""


class _Stopped(Exception):
    """Training stopped for a reason outside of it; the message says why."""


@contextmanager
def reading_input() -> Iterator[None]:
    """Errors in here are about what the user gave; outside of it, in training, they keep their traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise _WrongInput(str(error)) from error


def run_train(options: argparse.Namespace) -> int:
    """``sekd train``."""
    with reading_input():
        trainer, resume = build(options.recipe, options.overrides)
    from transformers.trainer_utils import get_last_checkpoint

    from rollouts import RolloutConfigError, RolloutError

    try:
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
    except RolloutError as error:
        folder = str(trainer.args.output_dir)
        hint = ". --resume_from_checkpoint true goes on from here" * (get_last_checkpoint(folder) is not None)
        raise _Stopped(f"{error}{hint}") from error
    except RolloutConfigError as error:
        raise _WrongInput(str(error)) from error
    finally:
        trainer.close()
    if trainer.is_world_process_zero():
        print(f"the student is in {trainer.args.output_dir}")
    return 0


def run_samples(options: argparse.Namespace) -> int:
    """``sekd samples``."""
    with reading_input():
        args, found = score(options.recipe, options.overrides)
    if args.process_index == 0:
        from sekd.samples import samples_path, show_samples

        show_samples(found, args.sample_score)
        print(f"the choice is in {samples_path(args)}")
    return 0


def run_cache(options: argparse.Namespace) -> int:
    """``sekd cache``."""
    from sekd.cache.commands import CACHE_ACTIONS

    parser = argparse.ArgumentParser(prog=f"sekd cache {options.action}", allow_abbrev=False)
    return CACHE_ACTIONS[options.action](parser, options.rest)


def run_demo(options: argparse.Namespace) -> int:
    """``sekd demo``."""
    from sekd.demo import demo

    demo(options.output_dir, options.seed)
    return 0


def build(recipe: str, overrides: Sequence[str] = ()) -> tuple[Any, str | bool | None]:
    """The trainer that a recipe describes, and the checkpoint to resume from.

    Raises:
        ValueError: what a recipe or its data has wrong; models are loaded last.
    """
    script, args, model = _parse_run(recipe, overrides)
    from transformers.trainer_utils import get_last_checkpoint
    from trl import get_peft_config

    from sekd.data.load import is_local, load_rows
    from sekd.trainer import SEKDTrainer

    resume = args.resume_from_checkpoint
    if resume in ("true", "True", True):
        resume = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
        if resume is None:
            raise ValueError(f"resume_from_checkpoint: there is no checkpoint in output_dir {args.output_dir!r}")
    train, held_out = _training_rows(script, args), None
    if args.eval_on_start or args.eval_strategy != "no":
        name = args.eval_dataset_name or script.dataset_name
        sliced = "[" in script.dataset_test_split
        if name is None or (args.eval_dataset_name is None and is_local(name) and not sliced):
            raise ValueError(
                "evaluation needs data of its own: set eval_dataset_name, or slice the file, for example "
                "dataset_test_split: train[:64] and dataset_train_split: train[64:]"
            )
        held_out = load_rows(name, script.dataset_config, script.dataset_test_split, script.dataset_streaming)
    trainer = SEKDTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=get_peft_config(model),
        model_init_kwargs=_model_options(model),
    )
    trainer.run_files.records = (script, args, model)
    return trainer, resume


def score(recipe: str, overrides: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
    """The configuration, and the sample choice that a recipe describes: made, or read if it was made before.

    Raises:
        ValueError: what a recipe, its data or an existing file has wrong; models are loaded last.
    """
    script, args, model = _parse_run(recipe, overrides)
    if args.sample_fraction == 1:
        raise ValueError("sample_fraction is 1, which keeps every sample; set it, for example --sample_fraction 0.2")
    from sekd.samples import choose_of

    return args, choose_of(_training_rows(script, args), model.model_name_or_path, args, _model_options(model))


def build_cache_of(
    recipe: str, overrides: Sequence[str] = (), engine: str = "local", workers: int | None = None
) -> Any:
    """The cache that a recipe describes, in its ``teacher_cache`` (``--output``): built, or gone on with.

    Raises:
        ValueError: what a recipe or its data has wrong, or a folder with another cache.
    """
    script, args, model = _parse_run(recipe, overrides)
    if args.teacher_cache is None:
        raise ValueError("there is no folder for the cache: add --output DIR")
    if args.teacher_model_name_or_path is None:
        raise ValueError("there is no teacher: set teacher_model_name_or_path to a folder or hub id")
    from sekd.cache.build import build_of

    rows = _training_rows(script, args)
    return build_of(rows, model.model_name_or_path, args, _model_options(model), engine, workers)


def plan_of(recipe: str, known: Collection[str] = ()) -> dict[str, Any]:
    """What a recipe says of its cache's size: draws, fraction, and what is not ``known`` already of positions
    (``sample_pool`` full samples) and the common vocabulary."""
    _, args, model = _parse_run(recipe, ())
    found: dict[str, Any] = {"draws": args.class_samples, "fraction": args.sample_fraction}
    if "positions" not in known and args.sample_pool is not None:
        found["positions"] = args.sample_pool * args.max_length
    if "vocab" not in known:
        from transformers import AutoConfig

        names = {model.model_name_or_path: model.model_revision}
        if args.teacher_model_name_or_path is not None:
            names[args.teacher_model_name_or_path] = args.teacher_model_revision
        configs = [AutoConfig.from_pretrained(name, revision=revision) for name, revision in names.items()]
        found["vocab"] = min(config.get_text_config().vocab_size for config in configs)
    return found


def _parse_run(recipe: str, overrides: Sequence[str]) -> tuple[Any, Any, Any]:
    script, args, model = parse_recipe(recipe, overrides)
    if model.model_name_or_path is None:
        raise ValueError("there is no student: set model_name_or_path to a folder or hub id")
    if script.dataset_name is None and args.rollouts is None:
        raise ValueError("there is no training data: set dataset_name to a file, folder or hub id")
    if script.dataset_streaming and args.rollouts is None:
        args.check_stream()
    return script, args, model


def _training_rows(script: Any, args: Any) -> Any:
    """The data of a recipe; the rollouts that it replays in its place."""
    from sekd.data.encode import ROLLOUT_COLUMNS
    from sekd.data.load import load_rows

    if args.rollouts is None:
        config, split = script.dataset_config, script.dataset_train_split
        return load_rows(script.dataset_name, config, split, script.dataset_streaming)
    path = os.path.abspath(os.path.expanduser(args.rollouts))  # a path, though it may look like a hub id
    rows = load_rows(path, field="rollouts")
    if missing := [column for column in ROLLOUT_COLUMNS if column not in rows.column_names]:
        raise ValueError(
            f"rollouts {args.rollouts!r} lacks the columns {' and '.join(missing)}: write it with save_rollouts, or "
            "name other data in dataset_name"
        )
    return rows


def _model_options(model: Any) -> dict[str, Any]:
    from trl import get_quantization_config

    return {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        "quantization_config": get_quantization_config(model),
    }


def parse_recipe(recipe: str, overrides: Sequence[str] = ()) -> tuple[Any, Any, Any]:
    """A recipe and command-line overrides as ScriptArguments, SEKDConfig and ModelConfig.

    Raises:
        ValueError: no such file, no mapping in it, an unknown key (names the nearest known one), or a bad value.
    """
    from trl import ModelConfig, ScriptArguments, TrlParser

    from sekd.config import SEKDConfig

    if not os.path.isfile(recipe):
        what = "is a folder; a recipe is a YAML file" if os.path.isdir(recipe) else "no such file"
        raise ValueError(f"recipe {recipe!r}: {what}")
    try:
        with open(recipe) as file:
            keys = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {recipe!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(keys, dict):
        raise ValueError(f"recipe {recipe!r} is not a mapping of keys to values")
    records = (ScriptArguments, SEKDConfig, ModelConfig)
    known = {f.name for record in records for f in fields(record) if f.init}
    flags = [flag[2:].split("=")[0].replace("-", "_") for flag in overrides if flag.startswith("--")]
    for key in [*keys, *flags]:
        if key not in known and key != "env" and not (key.startswith("no_") and key[3:] in known):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise ValueError(
                f"unknown key {key!r} in {'the recipe' if key in keys else 'the command line'}; "
                f"the nearest known one is {near!r}"
            )
    parser = TrlParser(records)
    parser.error = _raise
    return parser.parse_args_and_config(["--config", recipe, *overrides])


def recipe_folder() -> str:
    """Where the recipes lie: beside the package in a checkout, inside it in a wheel."""
    package = os.path.dirname(os.path.abspath(__file__))
    inside = os.path.join(package, "recipes")
    return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(package), "recipes")


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _field_help() -> str:
    from transformers import TrainingArguments

    from sekd.config import SEKDConfig

    inherited = {f.name for f in fields(TrainingArguments)}
    lines = [
        f"  {f.name} = {f.default}\n      {f.metadata['help'].replace('%%', '%')}"
        for f in fields(SEKDConfig)
        if f.name not in inherited
    ]
    return "fields:\n" + "\n".join(lines)


COMMANDS = {"train": run_train, "samples": run_samples, "cache": run_cache, "demo": run_demo}

if __name__ == "__main__":
    sys.exit(main())
