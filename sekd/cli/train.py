"""``sekd train``."""

import argparse
import os

from sekd.cli.common import Stopped, WrongInput, add_recipe, reading_input

DESCRIPTION = """\
Distil a teacher into a student as a recipe says.

A recipe is flat YAML. Its keys are listed below; every other field of transformers' TrainingArguments, and of TRL's
ScriptArguments and ModelConfig, is a key too. The command line takes each key as --key value, which beats the recipe.

examples:
  sekd train gsm8k_on_policy_sekd --max_steps 100 --learning_rate 2e-6
  sekd train my_recipe.yaml --resume_from_checkpoint true
  accelerate launch -m sekd.cli train my_recipe.yaml     # several GPUs

The output folder gets the student, its tokenizer, recipe.yaml (as run), versions.json and metrics.jsonl.
--resume_from_checkpoint true resumes from the last checkpoint in it.
"""
HELP_FILE = os.path.join(os.path.dirname(__file__), "train_help.txt")
"""The keys, by group. ``python -m sekd.cli.fields`` writes the file. Showing it needs no import of the fields."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.description = DESCRIPTION
    with open(HELP_FILE, encoding="utf-8") as file:
        parser.epilog = file.read()


def run(options: argparse.Namespace) -> int:
    from sekd.recipe import Run

    with reading_input():
        recipe = Run.parse(options.recipe, options.overrides)
        resume = recipe.resume
        trainer = recipe.trainer()
    from transformers.trainer_utils import get_last_checkpoint

    from rollouts import RolloutConfigError, RolloutError

    try:
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
    except RolloutError as error:
        folder = str(trainer.args.output_dir)
        hint = ". --resume_from_checkpoint true resumes from here" * (get_last_checkpoint(folder) is not None)
        raise Stopped(f"{error}{hint}") from error
    except RolloutConfigError as error:
        raise WrongInput(str(error)) from error
    finally:
        trainer.close()
    if trainer.is_world_process_zero():
        print(f"the student is in {trainer.args.output_dir}")
    return 0
