#!/usr/bin/env python3
"""How fast the engines generate, how long a weight sync takes, and how a step's time is spent.

    python scripts/bench_rollouts.py STUDENT TEACHER 'text/*.jsonl' [--prompts 1 8 32 128] [--enforce_eager]

The prompts are the first tokens of the texts. The engines take turns within a round; medians over rounds are printed.
This script starts the server (scripts/serve_student.sh). Steps are taken by SEKDTrainer with vLLM in its process: 16
prompts, SE-KD 20 %, reverse KL, with exact scores and the sampler's scores (score_source: rollout) in turn.

`of bare` compares vLLM's engine of sekd with `LLM.generate` of the same LLM, for the same requests, in turns.
"""

import argparse
import contextlib
import itertools
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_table import write_figures
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

import sekd.trainer
from rollouts import HFEngine, Sampling, VLLMEngine, VLLMServerEngine
from rollouts.base import separate_seeds
from sekd import SEKDConfig, SEKDTrainer
from sekd.data.load import load_rows
from sekd.models import freeze, load_model
from sekd.on_policy.engines import send_weights
from sekd.timing import untimed
from sekd.types import Batch, Positions

ENGINES = ("hf", "vllm", "vllm_server")
OF_BARE = {"of bare": 0, "of bare, with log-probabilities": 20}
"""Names of the ratios of :func:`compare_with_bare`, and the number of log-probabilities."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("text", help="json, jsonl, csv or parquet files with a text column")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps with each score_source")
    parser.add_argument("--enforce_eager", action="store_true", help="vLLM without compiling the model")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.student)
    texts = load_rows(options.text)
    with tempfile.TemporaryDirectory() as folder:
        speeds = engines(options, tokenizer, texts, folder)
        steps = step_seconds(options, tokenizer, texts, folder)
    show(options, speeds, steps)
    write_figures(options.json, "rollouts", speeds | steps)


def engines(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, texts: Dataset, folder: str
) -> dict[str, dict[Any, float]]:
    """For each engine, the median tokens per second by number of prompts, and the seconds of a sync as ``sync``.

    ``vllm`` has the ratios of :func:`compare_with_bare` too.
    """
    needed, length = sum(options.prompts), options.prompt_tokens
    tokens = (tokenizer(row["text"])["input_ids"][:length] for row in texts)
    prompts = list(itertools.islice((ids for ids in tokens if len(ids) == length), needed))
    if len(prompts) < needed:
        raise SystemExit(f"{options.text} has {len(prompts)} texts of {length} tokens; --prompts needs {needed}")
    rest = iter(prompts)  # different prompts for each number, so that no prefix is cached
    prompts_by_count = {count: [*itertools.islice(rest, count)] for count in options.prompts}
    model = load_model(options.student, dtype=torch.bfloat16)
    with contextlib.ExitStack() as running:
        engines_by_name = {name: start_engine(name, options, model, folder, running) for name in options.engines}
        times: dict[str, dict[Any, list[float]]] = {name: {} for name in engines_by_name}
        for round_ in tqdm(range(options.rounds + 1), desc="engines"):  # the first one warms up
            for name, engine in engines_by_name.items():
                started = time.perf_counter()
                send_weights(engine, model, round_)
                times[name].setdefault("sync", []).append(time.perf_counter() - started)
                for count in options.prompts:
                    started = time.perf_counter()
                    rollouts = engine.generate(prompts_by_count[count])
                    seconds = time.perf_counter() - started
                    times[name].setdefault(count, []).append(sum(len(r.completion_ids) for r in rollouts) / seconds)
        if "vllm" in engines_by_name:
            times["vllm"] |= compare_with_bare(options, engines_by_name["vllm"], prompts)
    return {
        name: {key: statistics.median(values[1:]) for key, values in by_key.items()} for name, by_key in times.items()
    }


def compare_with_bare(
    options: argparse.Namespace, engine: VLLMEngine, prompts: list[list[int]]
) -> dict[Any, list[float]]:
    """The engine's speed / the speed of ``LLM.generate`` of its LLM, by round, for each of ``OF_BARE``.

    Both generate the same tokens, from the same seeds.
    """
    from vllm import SamplingParams

    requests: Any = [{"prompt_token_ids": ids} for ids in prompts]
    ratios: dict[Any, list[float]] = {name: [] for name in OF_BARE}
    for round_, name in itertools.product(range(options.rounds + 1), OF_BARE):
        sampling = Sampling(max_completion_length=options.new_tokens, top_logprobs=OF_BARE[name])
        settings = sampling.for_vllm() | {"detokenize": False, "flat_logprobs": True}
        params = [SamplingParams(**settings, seed=seed) for seed in separate_seeds(sampling, len(prompts))]
        seconds = [0.0, 0.0]
        for is_bare in (round_ % 2, 1 - round_ % 2):
            engine.llm.reset_prefix_cache()
            started = time.perf_counter()
            if is_bare:
                outputs = engine.llm.generate(requests, params, use_tqdm=False)
            else:
                rollouts = engine.generate_with(prompts, sampling)
            seconds[is_bare] = time.perf_counter() - started
        if [r.completion_ids for r in rollouts] != [[*output.outputs[0].token_ids] for output in outputs]:
            raise SystemExit("the engine and LLM.generate did not generate the same tokens")
        ratios[name].append(seconds[True] / seconds[False])
    return ratios


def start_engine(name: str, options: argparse.Namespace, model: Any, folder: str, running: contextlib.ExitStack) -> Any:
    """An engine that is closed when ``running`` is."""
    sampling = dict(max_completion_length=options.new_tokens)
    if name == "hf":
        return HFEngine(model, **sampling)
    sampling |= dict(max_prompt_length=options.prompt_tokens)
    if name == "vllm":
        engine: Any = VLLMEngine(options.student, dtype="bfloat16", enforce_eager=options.enforce_eager, **sampling)
    else:
        url = running.enter_context(serve(options, folder))
        engine = VLLMServerEngine(url, weights_folder=f"{folder}/weights", **sampling)
    running.callback(engine.close)
    return engine


@contextlib.contextmanager
def serve(options: argparse.Namespace, folder: str) -> Iterator[str]:
    """Start a server of the student for the block; gives its address."""
    context = options.prompt_tokens + options.new_tokens
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("serve_student.sh")
    command = ["bash", str(script), options.student, "--port", str(port), "--max-model-len", str(context)]
    command += ["--enforce-eager"] * options.enforce_eager
    with open(f"{folder}/server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


class Clock(TrainerCallback):
    """The seconds of each step, and of its parts as :mod:`sekd.timing` knows them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.agreement, self.started = 0.0, 0.0
        self.trainer: Any = None

    def around_agreement(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its seconds kept apart: it is for this script's table alone."""

        def measure(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            with untimed():
                result = function(*args, **kwargs)
            self.agreement += time.perf_counter() - started
            return result

        return measure

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self.started - self.agreement
        self.steps.append(self.trainer.stopwatch.take() | {"all": seconds})
        engine, exact = self.trainer.engine, state.global_step % 2  # the next one
        engine.sampling = replace(engine.sampling, top_logprobs=0 if exact else self.trainer.args.score_logprobs)
        self.agreement, self.started = 0.0, time.perf_counter()


def step_seconds(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, texts: Dataset, folder: str
) -> dict[str, dict[str, float]]:
    """By source of scores the median seconds of a step by what they went to, and ``agreement`` with exact selection."""
    args = SEKDConfig(
        f"{folder}/run",
        lmbda=1.0,
        text_prompt_length=options.prompt_tokens,
        max_prompt_length=options.prompt_tokens,
        max_completion_length=options.new_tokens,
        score_source="rollout",
        vllm_enforce_eager=options.enforce_eager,
        max_steps=2 * options.steps + 2,
        per_device_train_batch_size=16,
        logging_steps=2 * options.steps + 2,
        log_completions_steps=0,
        save_strategy="no",
        disable_tqdm=False,  # which is True by default where the verbosity is low
        report_to="none",
    )
    clock = Clock()
    student = load_model(options.student, dtype=torch.float32)
    teacher: Any = freeze(load_model(options.teacher, dtype=torch.bfloat16))
    clock.trainer = trainer = SEKDTrainer(student, teacher, args, texts, processing_class=tokenizer, callbacks=[clock])
    one_sequence, every = sekd.trainer.measure_agreement, sekd.trainer.AGREEMENT_STEPS
    sekd.trainer.measure_agreement = clock.around_agreement(of_all(one_sequence))
    sekd.trainer.AGREEMENT_STEPS = 1
    try:
        trainer.train()
    finally:
        sekd.trainer.measure_agreement, sekd.trainer.AGREEMENT_STEPS = one_sequence, every
        trainer.close()
    (log,) = (log for log in trainer.state.log_history if "loss" in log)
    found = {}
    for first, source in ((3, "exact"), (2, "rollout")):  # the first two warm up
        steps = clock.steps[first::2]
        for step in steps:
            step["student"] = step["all"] - sum(step[what] for what in SHARES)
        found[source] = {what: statistics.median(step[what] for step in steps) for what in (*SHARES, "student", "all")}
    found["exact"]["agreement"], found["rollout"]["agreement"] = 1.0, log["selection_agreement"]
    return found


SHARES = ("generation", "sync", "scoring", "teacher")


def of_all(agreement: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., dict[str, torch.Tensor]]:
    """Agreement of all sequences of a batch, where training looks at the first."""

    def of_each(head: Any, positions: Positions, batch: Batch, allowed: torch.Tensor, **options: Any) -> Any:
        sequence = torch.arange(len(batch.valid)).repeat_interleave(batch.valid.sum(1))  # of each position
        sums = []
        for b in range(len(batch.valid)):
            fields = ("input_ids", "targets", "position_ids", "sample_ids", "student_entropy")
            one = replace(batch, **{name: getattr(batch, name)[b : b + 1] for name in fields})
            sums.append(agreement(head, positions[sequence == b], one, allowed[b : b + 1], **options))
        return {name: sum(one[name] for one in sums) for name in sums[0]}

    return of_each


def show(options: argparse.Namespace, speeds: dict[str, dict[Any, float]], steps: dict[str, dict[str, float]]) -> None:
    """Print the tables."""
    first = options.engines[0]
    speed = Table("prompts", *speeds, title="tokens a second", title_justify="left")
    for count in options.prompts:
        one = speeds[first][count]
        speed.add_row(str(count), *(f"{of[count]:,.0f} ({of[count] / one:.1f}x)" for of in speeds.values()))
    speed.add_row("sync, seconds", *(f"{of['sync']:.2f}" for of in speeds.values()))
    for name in OF_BARE:
        speed.add_row(name, *(f"{of[name]:.3f}" if name in of else "" for of in speeds.values()))
    step = Table("", *(f"score_source: {source}" for source in steps), title="a step", title_justify="left")
    for what in ("generation", "sync", "scoring", "teacher", "student"):
        step.add_row(what, *(f"{of[what]:.2f} s ({of[what] / of['all']:.0%})" for of in steps.values()))
    step.add_row("all", *(f"{of['all']:.2f} s" for of in steps.values()))
    step.add_row("selection_agreement", *(f"{of['agreement']:.3f}" for of in steps.values()))
    for table in (speed, step):
        for column in table.columns[1:]:
            column.justify = "right"
        Console().print(table)


if __name__ == "__main__":
    main()
