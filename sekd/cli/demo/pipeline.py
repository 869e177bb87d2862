"""The main job, from nothing, in a few minutes on a CPU."""

import importlib.util
import json
import os
import time
from collections.abc import Sequence

import datasets
import torch
from rich.table import Table
from tqdm import trange
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM, set_seed
from transformers.utils import logging

from rollouts import HFEngine
from sekd.cli.demo.word_problems import build_tokenizer, extract_answer, make_problems
from sekd.config import SEKDConfig
from sekd.data.batch import Sample, collate
from sekd.data.load import load_rows
from sekd.data.prepare import prepare
from sekd.metric_kinds import ACCURACY
from sekd.parse import list_recipes
from sekd.recipe import Run
from sekd.report.page import write_report
from sekd.sweep.scores import Column
from sekd.sweep.table import Line, write_results
from sekd.tables import print_table
from sekd.types import IGNORE

TRAIN, HELD_OUT = 4000, 200
TEACHER = dict(hidden=192, layers=3, heads=3, steps=200)
STUDENT = dict(hidden=160, layers=2, heads=3, steps=100)
METHODS = {"SE-KD 20 %": ("sekd", "top_k"), "Full KD": ("full_kd", "all")}
"""Method -> the folder of its run, and its position policy."""
PROMPT = "{prompt}\n"


def run_demo(folder: str, seed: int, **overrides: str) -> dict[str, float]:
    """Make the task, the teacher and the student in ``folder``, and distil twice.

    Writes ``report.html`` and prints exact match on held-out problems; returns it, in percent. ``overrides`` beat
    ``recipes/demo.yaml``, by key.
    """
    started = time.monotonic()
    # Files of a few megabytes need no progress bars.
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    tokenizer, data, held_out = make_task(folder, seed)
    matches, seconds = {}, {}
    for name, size in (("teacher", TEACHER), ("student", STUDENT)):
        phase_started = time.monotonic()
        model = make_model(tokenizer, size["hidden"], size["layers"], size["heads"], seed)
        train_on_answers(model, tokenizer, data, size["steps"], seed, f"{name}: cross-entropy")
        model.save_pretrained(os.path.join(folder, name))
        tokenizer.save_pretrained(os.path.join(folder, name))
        label = "teacher" if name == "teacher" else "student before"
        matches[label] = measure_exact_match(model, tokenizer, held_out)
        seconds[label] = time.monotonic() - phase_started

    for label, (name, policy) in METHODS.items():
        phase_started = time.monotonic()
        print(f"student: {label}, on-policy")
        keys = {
            "model_name_or_path": os.path.join(folder, "student"),
            "teacher_model_name_or_path": os.path.join(folder, "teacher"),
            "dataset_name": data,
            "output_dir": os.path.join(folder, name),
            "overwrite_output_dir": "true",
            "position_policy": policy,
            "seed": str(seed),
            "rollout_engine": choose_engine(),
            **overrides,
        }
        flags = [part for key, value in keys.items() for part in (f"--{key}", value)]
        trainer = Run.parse(list_recipes()["demo"], flags).trainer()
        trainer.train()
        trainer.save_model()
        trainer.close()
        matches[f"student after {label}"] = measure_exact_match(trainer.model, tokenizer, held_out)
        seconds[f"student after {label}"] = time.monotonic() - phase_started
    show_matches(matches, seconds, seed, time.monotonic() - started)
    write_matches(folder, matches, seed)
    report = os.path.join(folder, "report.html")
    write_report([folder], report, "The demo")
    print(f"{report} shows the two runs, and which positions they chose: open it in a browser")
    return matches


def make_task(
    folder: str, seed: int, held_out: int = HELD_OUT
) -> tuple[PreTrainedTokenizerBase, str, list[dict[str, str]]]:
    """The demo's tokenizer, the path of its training problems, which it writes, and ``held_out`` other problems."""
    set_seed(seed)
    problems = make_problems(TRAIN + held_out, seed)
    os.makedirs(folder, exist_ok=True)
    data = os.path.join(folder, "train.jsonl")
    with open(data, "w") as file:
        file.writelines(json.dumps(problem) + "\n" for problem in problems[:TRAIN])
    return build_tokenizer(problems), data, problems[TRAIN:]


def make_model(tokenizer: PreTrainedTokenizerBase, hidden: int, layers: int, heads: int, seed: int) -> Qwen3ForCausalLM:
    """An untrained Qwen3 with heads of 64, the smallest that vLLM takes."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=hidden**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def train_on_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str,
    steps: int,
    seed: int,
    name: str,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
) -> None:
    """Train with cross-entropy on the answers."""
    args = SEKDConfig(prompt_column="question", completion_column="answer", prompt_template=PROMPT)
    samples = [Sample(**row) for row in prepare(load_rows(data), tokenizer, args)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    model.to(args.device).train()
    for _ in (bar := trange(steps, desc=name)):
        chosen = torch.randint(len(samples), (batch_size,), generator=generator).tolist()
        batch = {k: v.to(args.device) for k, v in collate([samples[i] for i in chosen], tokenizer.pad_token_id).items()}
        with torch.autocast(args.device.type, torch.bfloat16, enabled=bool(args.bf16)):
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def measure_exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[dict[str, str]],
    max_completion_length: int = 64,
    batch_size: int = 200,
) -> float:
    """Share of greedy answers whose number is right, in percent."""
    engine = HFEngine(model, temperature=0.0, max_completion_length=max_completion_length, batch_size=batch_size)
    prompts = tokenizer([PROMPT.replace("{prompt}", problem["question"]) for problem in problems])["input_ids"]
    texts = [tokenizer.decode(rollout.completion_ids) for rollout in engine.generate(prompts)]
    right = [extract_answer(t) == extract_answer(p["answer"]) for t, p in zip(texts, problems, strict=True)]
    return 100 * sum(right) / len(right)


def choose_engine() -> str:
    """vLLM if it is installed, else transformers."""
    return "vllm" if importlib.util.find_spec("vllm") else "hf"


def show_matches(matches: dict[str, float], seconds: dict[str, float], seed: int, total: float) -> None:
    """Print the table that the demo ends with."""
    table = Table(title=f"exact match on {HELD_OUT} held-out problems (seed {seed}, {total:.0f} s in all)")
    table.add_column("model")
    table.add_column("exact match", justify="right")
    table.add_column("seconds", justify="right")
    for name, value in matches.items():
        table.add_row(name, f"{value:.1f} %", f"{seconds[name]:.0f}")
    print_table(table)


def write_matches(folder: str, matches: dict[str, float], seed: int) -> None:
    """Write the table into the folder, as a sweep does, for `sekd report`."""
    lines = []
    for place, name in enumerate(matches):
        method = name.removeprefix("student after ")
        is_reference = method not in METHODS
        folders: dict[int | None, str] = {} if is_reference else {seed: METHODS[method][0]}
        lines.append(Line(method, "", {None if is_reference else seed: place}, folders))
    values: list[float | None] = [value / 100 for value in matches.values()]
    column = Column("exact match", ACCURACY, values, [None] * len(values), is_main=True)
    baseline = next(line for line in lines if line.method == "Full KD")
    facts = {"title": f"Exact match on {HELD_OUT} held-out problems", "baseline": baseline.method}
    write_results(folder, [column], lines, baseline, facts)
