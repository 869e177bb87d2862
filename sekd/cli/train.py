"""``sekd train``."""

import argparse
import os
import shlex
import signal
from functools import partial

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
--resume_from_checkpoint true resumes from the newest whole checkpoint in it. The exit status is 0, 1 (training
stopped), 2 (wrong input), 130 (Ctrl-C) or 143 (SIGTERM, after saving a checkpoint).
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
        recipe.check_output_dir()
        trainer = recipe.trainer()
    from rollouts import RolloutConfigError, RolloutError
    from sekd.checkpoints import RunRefused
    from sekd.files import DamagedFile
    from sekd.resumable import Interrupted

    folder, hint = str(trainer.args.output_dir), partial(hint_at_resuming, options)
    try:
        with trainer.hold_folder():
            trainer.train(recipe.resume)
            trainer.save_model()
    except (RunRefused, RolloutConfigError) as error:
        raise WrongInput(str(error)) from error
    except Interrupted as error:
        raise Stopped(f"{error}{hint(folder)}", 128 + signal.SIGTERM) from error
    except KeyboardInterrupt as error:
        raise Stopped(f"stopped after step {trainer.state.global_step}{hint(folder)}", 128 + signal.SIGINT) from error
    except (RolloutError, DamagedFile, OSError) as error:
        raise Stopped(f"stopped after step {trainer.state.global_step}: {error}{hint(folder)}") from error
    finally:
        trainer.close()
    if trainer.is_world_process_zero():
        print(f"the student is in {folder}")
    return 0


def hint_at_resuming(options: argparse.Namespace, folder: str) -> str:
    """The end of an error: the newest checkpoint, and the command that resumes from it."""
    from sekd.checkpoints import list_checkpoints

    steps = [*list_checkpoints(folder)]
    if not steps:
        return f"; no checkpoint is in {folder!r} yet"
    command = shlex.join(["sekd", "train", options.recipe, *options.overrides, "--resume_from_checkpoint", "true"])
    return f"; the newest checkpoint is of step {steps[-1]}. To resume: {command}"
