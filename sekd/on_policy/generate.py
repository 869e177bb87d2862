"""Generate a file of rollouts before training, and resume if it was stopped.

Rollouts are generated in rounds. Each round has seeds of its own, so a stopped command repeats the last round only.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from rollouts import Rollout, Sampling
from sekd.config import SEKDConfig
from sekd.data.batch import Sample
from sekd.files import DamagedFile, lock_folder, read_checked, sync, write_checked
from sekd.fingerprints import DATED_TEMPLATE, data_fingerprint, tokenizer_fingerprint, weights_fingerprint
from sekd.models import causal_lm
from sekd.on_policy.engines import make_sampling
from sekd.on_policy.record import append_rollouts, read_whole_lines, resume_file
from sekd.on_policy.schedule import RolloutSchedule

ROUND_SIZE = 256
"""Rollouts of a round, unless the user chooses."""

ROUNDS = 100_003
"""Round n of ``seed`` s samples with seed s * ROUNDS + n, so runs with other seeds share no round."""

FIELDS = {
    "student": "the student's weights (model_name_or_path, model_revision or dtype)",
    "tokenizer": "the tokenizer",
    "prompts": "the prompts (dataset_name, its split, sample_fraction, sample_score, sample_pool, the template, "
    f"max_prompt_length, teacher_system_prompt or teacher_prompt_prefix; {DATED_TEMPLATE})",
    "sampling": "the sampling (temperature, top_p, top_k, min_p, repetition_penalty, stop_strings, seed, "
    "max_completion_length, eos, or the teacher's number of classes)",
    "rollouts_per_prompt": "rollouts_per_prompt",
    "engine": "rollout_engine",
    "precision": "bf16 or fp16",
    "round_size": "--round-size",
}
"""The settings of a file, and the keys that decide each."""


@dataclass
class RolloutCounts:
    """How many rollouts a file holds, their generated tokens, and how many are cut at the limit or empty."""

    rollouts: int = 0
    tokens: int = 0
    cut: int = 0
    empty: int = 0

    def add(self, completion_ids: Sequence[int], finish_reason: str) -> None:
        """Count a rollout."""
        self.rollouts += 1
        self.tokens += len(completion_ids)
        self.cut += finish_reason == "length"
        self.empty += not completion_ids


def check_file(path: str, round_size: int) -> None:
    """Check the options of `sekd rollouts`, before models load.

    Raises:
        ValueError: a file with another ending, a folder, or rounds without rollouts.
    """
    if not path.endswith(".jsonl") or os.path.isdir(path):
        raise ValueError(f"--output {path!r} must name a file that ends with .jsonl, such as rollouts/mine.jsonl")
    if round_size < 1:
        raise ValueError(f"--round-size {round_size} must be at least 1")


def is_unfinished(path: str) -> bool:
    """Whether a stopped command left a part of the rollouts of ``path``."""
    return os.path.isdir(_name_part(path)) and not os.path.exists(path)


def generate_rollouts(
    path: str,
    dataset: Dataset,
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: SEKDConfig,
    classes: int,
    round_size: int = ROUND_SIZE,
) -> RolloutCounts:
    """Generate ``args.rollouts_per_prompt`` rollouts of each prompt into ``path``, or resume a stopped call.

    ``path`` appears when all rollouts are in it. Its settings are in ``PATH.settings.json``.

    Args:
        dataset: prepared samples.
        classes: the number of classes that student and teacher have in common. No other token is drawn.
        round_size: the number of rollouts in a round.

    Raises:
        ValueError: ``path`` has rollouts with other settings, or another process generates it.
        DamagedFile: ``path`` lacks rollouts, or its settings are damaged.
        RolloutError, RolloutConfigError: the engine fails.
    """
    part, sampling = _name_part(path), make_sampling(causal_lm(student), tokenizer, args, classes)
    refusal = ValueError(f"another process generates {path!r}; wait for it, or name another --output")
    with lock_folder(part, refusal):
        unfinished = os.path.join(os.path.abspath(part), "rollouts.jsonl")
        try:
            _claim(path, unfinished, _describe(dataset, student, tokenizer, args, sampling, round_size))
        except ValueError:
            with suppress(OSError):  # it has rollouts
                os.rmdir(part)
            raise
        if not os.path.exists(path):
            samples = [Sample(**row) for row in dataset for _ in range(args.rollouts_per_prompt)]
            schedule = RolloutSchedule(args, Accelerator(), tokenizer, lambda: student, classes, lambda **_: None)

            def generate(number: int, prompts: list[list[int]]) -> list[Rollout]:
                seeded = replace(sampling, seed=args.seed * ROUNDS + number)
                return [replace(rollout, weights_step=0) for rollout in schedule.generate_with(prompts, seeded)]

            with closing(schedule):
                _fill(unfinished, samples, round_size, tokenizer, generate, bool(args.disable_tqdm))
            sync(unfinished)
            os.replace(unfinished, path)
        os.rmdir(part)
    counts, expected = _count(path), len(dataset) * args.rollouts_per_prompt
    if counts.rollouts != expected:
        raise DamagedFile(f"{path!r} has {counts.rollouts} of {expected} rollouts; delete it to generate them again")
    return counts


def _describe(
    dataset: Dataset,
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: SEKDConfig,
    sampling: Sampling,
    round_size: int,
) -> dict[str, Any]:
    """The settings that the rollouts depend on."""
    return {
        "student": weights_fingerprint(student),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "prompts": data_fingerprint(dataset),
        "sampling": asdict(replace(sampling, stop=[*sampling.stop])),
        "rollouts_per_prompt": args.rollouts_per_prompt,
        "engine": args.rollout_engine,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "round_size": round_size,
    }


def _fill(
    path: str,
    samples: Sequence[Sample],
    round_size: int,
    tokenizer: PreTrainedTokenizerBase,
    generate: Callable[[int, list[list[int]]], list[Rollout]],
    disable_tqdm: bool,
) -> None:
    """Generate the rounds that the file lacks."""
    done = sum(1 for _ in read_whole_lines(path)) // round_size
    resume_file(path, done)
    counts = _count(path)
    bar = tqdm(total=len(samples), initial=counts.rollouts, desc="Generating", unit="rollout", disable=disable_tqdm)
    for start in range(done * round_size, len(samples), round_size):
        number, answered = start // round_size, samples[start : start + round_size]
        rollouts = generate(number, [sample.input_ids[: sample.prompt_length] for sample in answered])
        append_rollouts(path, number, answered, rollouts, tokenizer)
        for rollout in rollouts:
            counts.add(rollout.completion_ids, rollout.finish_reason)
        bar.update(len(rollouts))
        bar.set_postfix_str(f"{counts.tokens / counts.rollouts:.0f} tokens a rollout")
    bar.close()


def _claim(path: str, unfinished: str, settings: dict[str, Any]) -> None:
    """Write the settings of a new file, or check that the rollouts of an old one have the same settings."""
    file = f"{path}.settings.json"
    hint = f"delete it, {file!r} and the folder {_name_part(path)!r} to generate again, or name another --output"
    has_rollouts = os.path.exists(path) or any(read_whole_lines(unfinished))
    if not os.path.exists(file) and os.path.exists(path):
        raise ValueError(f"{path!r} exists, and `sekd rollouts` did not generate it; name another --output")
    if not os.path.exists(file) or not has_rollouts:
        with suppress(FileNotFoundError):
            os.remove(unfinished)  # of settings that are not known
        write_checked(file, settings)
        return
    try:
        before = read_checked(file)
    except DamagedFile as error:
        raise DamagedFile(f"{error}; {hint}") from error
    for name, meaning in FIELDS.items():
        if before.get(name) != settings[name]:
            raise ValueError(f"{path!r} was begun with another value of {meaning}; {hint}")


def _count(path: str) -> RolloutCounts:
    counts = RolloutCounts()
    for line in read_whole_lines(path):
        counts.add(line["completion_ids"], line["finish_reason"])
    return counts


def _name_part(path: str) -> str:
    """The folder of the rollouts until all are generated."""
    return f"{path}.part"
