"""``sekd evaluate``."""

import argparse
import os
import signal
from collections.abc import Iterable
from typing import Any

from sekd.cli.common import Stopped, WrongInput, reading_input

DESCRIPTION = """\
Evaluate models on benchmarks, and compare them with the first one.

The suite `paper` has zero-shot accuracy on HellaSwag, PIQA, ARC-Easy, GSM8K and LAMBADA with their mean, the perplexity
on LAMBADA, the calibration error, and IFEval. `validation` has ARC-Easy, GSM8K, HellaSwag and PIQA on other rows.
--tasks takes arc_challenge, svamp, aime25, and every task of lm-eval. A split may follow a task: gsm8k@train[:500].

`distillation` measures the distance from --teacher: forward and reverse KL, perplexity, calibration and top-1 agreement
on --text, and on fresh completions of --prompts reverse KL, length, cut-off share and, with --answer-column, accuracy.

A MODEL is a folder or a hub id, of a whole model or an adapter. Its results are in a folder of its own below --output:
results.json and samples.parquet. The same command again computes only what is missing, also after Ctrl-C.

examples:
  sekd evaluate HuggingFaceTB/SmolLM2-135M-Instruct --suite paper
  sekd evaluate start_model my_run/ --tasks gsm8k svamp --limit 200
  sekd evaluate my_run/ --suite paper --data-dir data/eval data/gsm8k          # without the hub
  sekd evaluate my_run/ --tasks aime25 --repeats 16 --temperature 0.6 --max-new-tokens 8192
  sekd evaluate start_model my_run/ --suite distillation --teacher big_model --text held_out.jsonl
"""

TASK_NAMES = ("shots", "limit", "seed", "max_new_tokens", "repeats", "temperature", "top_p")
"""Options of the command that are fields of ``TaskOptions``."""
SAME_NAMES = (
    "teacher",
    *("text", "text_split", "prompts", "prompts_split", "answer_column", "prompt_column", "completion_column"),
    *("messages_column", "text_column", "prompt_template", "system_prompt", "text_prompt_length", "max_length"),
    *("limit", "seed", "repeats", "temperature", "top_p", "max_new_tokens", "dtype", "batch_size"),
    *("teacher_load_in_4bit", "teacher_load_in_8bit"),
)
"""Options of the command that are fields of ``DistillationOptions``."""
COMPLETION_NAMES = ("max_new_tokens", "repeats", "temperature", "top_p", "seed", "backend")
"""Options that the suite distillation reads for completions of ``--prompts`` alone, and that benchmarks read too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.usage = f"{parser.prog} MODEL [MODEL ...] [--suite NAME ...] [--tasks NAME ...] [options]"
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="a folder or hub id; the others are compared with the first"
    )
    add = parser.add_argument_group("what is evaluated").add_argument
    add("--suite", nargs="+", default=[], action="extend", metavar="NAME", help="paper, validation or distillation")
    add("--tasks", nargs="+", default=[], action="extend", metavar="NAME", help="tasks beside or instead of a suite")
    add("--data-dir", nargs="+", default=[], action="extend", metavar="DIR", help="folders with TASK/SPLIT.jsonl files")
    add("--limit", type=int, metavar="N", help="only the first N items of each task")
    add("--shots", type=int, metavar="N", help="few-shot examples (0; of other lm-eval tasks their own number)")
    add("--chat-template", action="store_true", help="the prompts are chats, in the model's template")
    add("--seed", type=int, metavar="N", help="of few-shot examples and sampling (0)")
    add = parser.add_argument_group("generated answers").add_argument
    add("--repeats", type=int, metavar="K", help="sample K answers of each prompt: avg@K and pass@K")
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="0 takes the likeliest token (0; 1 with --repeats and for distillation)",
    )
    add("--top-p", type=float, metavar="P", help="the share of probability that is sampled from (1)")
    add("--max-new-tokens", type=int, metavar="N", help="length of an answer (the task's own, or 256)")
    add = parser.add_argument_group("suite distillation").add_argument
    add("--teacher", metavar="MODEL", help="a folder or hub id with the models' tokenizer")
    for bits, kind in ((4, "NF4"), (8, "LLM.int8")):
        text = f"hold the teacher in {bits} bits ({kind}), except its head; needs bitsandbytes"
        add(f"--teacher-load-in-{bits}bit", action="store_true", default=None, help=text)
    add("--text", metavar="FILE", help="texts, prompts with completions, or conversations: a file or hub dataset")
    add("--text-split", metavar="SPLIT", help="such as test or train[:100] (train)")
    add("--prompts", metavar="FILE", help="prompts that each model completes: a file or hub dataset")
    add("--prompts-split", metavar="SPLIT", help="such as test or train[:100] (train)")
    add("--answer-column", metavar="NAME", help="the column of the prompts' right answers")
    for name in ("prompt", "completion", "messages", "text"):
        add(f"--{name}-column", metavar="NAME", help=f"({name})")
    add("--prompt-template", metavar="TEXT", help="around each prompt; {prompt} is its place")
    add("--system-prompt", metavar="TEXT", help="the first message of each chat")
    add("--text-prompt-length", type=int, metavar="N", help="of plain text, the first N tokens are the prompt")
    add("--max-length", type=int, metavar="N", help="tokens of a text; longer ones are cut (1024)")
    add = parser.add_argument_group("how models run").add_argument
    add("--backend", choices=("vllm", "hf"), help="vLLM or transformers (vllm where it is installed)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="of the weights (the faster one on this machine)")
    add("--batch-size", type=_read_batch_size, metavar="N", help="a number, or auto (the default): a size that fits")
    add(
        "--model-args",
        nargs="+",
        default=[],
        action="extend",
        metavar="KEY=VALUE",
        help="more arguments of vllm.LLM or from_pretrained, such as tensor_parallel_size=2",
    )
    add = parser.add_argument_group("results").add_argument
    add("--output", default="evaluations", metavar="DIR", help="the folder of the results (%(default)s)")
    add("--force", action="store_true", help="evaluate again what is done")


def _read_batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of at least 1")
    return int(text)


def list_names(options: argparse.Namespace) -> list[str]:
    """The suites and tasks that are asked for."""
    return [name for given in (*options.suite, *options.tasks) for name in given.split(",") if name]


def run(options: argparse.Namespace) -> int:
    names = list_names(options)
    with reading_input():
        from sekd.eval.benchmark import evaluate_models
        from sekd.eval.compare import show_table, write_comparison
        from sekd.eval.records import EvaluationRefused
        from sekd.eval.tasks import DISTILLATION, SUITES, check_lm_eval, resolve_tasks

        check_lm_eval()
        benchmarks = [name for name in names if name != DISTILLATION]
        # without any name, the error of resolve_tasks() lists what there is
        tasks = resolve_tasks(benchmarks) if benchmarks or not names else []
        check_effects(options, bool(tasks), DISTILLATION in names)
        how = read_options(options, measures_distance=DISTILLATION in names)
    try:
        results = evaluate_models(options.models, tasks, how)
    except EvaluationRefused as error:
        raise WrongInput(str(error)) from error
    except KeyboardInterrupt as error:
        raise Stopped(str(error) or "stopped", 128 + signal.SIGINT) from error
    except OSError as error:
        again = "run it again without --force" if how.force else "the same command resumes"
        raise Stopped(f"stopped: {error}; what is done is kept, and {again}") from error
    suites = [name for name in names if name in SUITES]
    show_table(results, *suites)
    with reading_input():
        write_comparison(how.output, results, *suites)
    print(f"the results are in {how.output}, with comparison.csv and comparison.md")
    return 0


def is_given(options: argparse.Namespace, name: str) -> bool:
    """Whether the user set an option."""
    return getattr(options, name) not in (None, [])


def check_effects(options: argparse.Namespace, has_tasks: bool, measures_distance: bool) -> None:
    """Raise ValueError for an option that has no effect: on benchmarks, or on the suite distillation alone."""

    def refuse(names: Iterable[str], reason: str) -> None:
        for name in names:
            if is_given(options, name):
                raise ValueError(f"--{name.replace('_', '-')} {reason}")

    if not measures_distance:
        own = [name for name in SAME_NAMES if name not in (*TASK_NAMES, "dtype", "batch_size")]
        refuse(own, "is for the suite distillation: add --suite distillation, or leave it out")
        return
    if not has_tasks:
        refuse(("data_dir", "shots", "model_args"), "is for benchmarks: add --tasks or another suite, or leave it out")
    if options.text is not None and options.prompts is None:
        refuse(("prompts_split", "answer_column", "text_prompt_length"), "is for --prompts: add it, or leave this out")
        if not has_tasks:
            refuse(COMPLETION_NAMES, "is for completions: add --prompts, or leave this out")
    if options.prompts is not None and options.text is None:
        refuse(("text_split", "max_length"), "is for --text: add it, or leave this out")


def read_options(options: argparse.Namespace, measures_distance: bool) -> Any:
    """The options of an evaluation.

    Raises:
        ValueError: a number is out of its range, or the suite distillation lacks an option.
    """
    from sekd.eval.backends import choose_backend
    from sekd.eval.benchmark import EvaluationOptions
    from sekd.eval.prepared import TaskOptions

    given = {name: getattr(options, name) for name in TASK_NAMES if is_given(options, name)}
    return EvaluationOptions(
        task=TaskOptions(**given, data_dirs=tuple(options.data_dir), chat_template=options.chat_template),
        output=os.path.expanduser(options.output),
        backend=options.backend,
        dtype=options.dtype,
        batch_size=options.batch_size,
        arguments=read_arguments(options.model_args),
        force=options.force,
        distillation=read_distillation(options, options.backend or choose_backend()) if measures_distance else None,
    )


def read_distillation(options: argparse.Namespace, engine: str) -> Any:
    """The options of the suite distillation. Those that are not given keep their defaults."""
    from sekd.eval.distillation_data import DistillationOptions

    if options.teacher is None:
        raise ValueError("the suite distillation needs --teacher MODEL: from which model to measure the distance")
    given = {name: getattr(options, name) for name in SAME_NAMES if is_given(options, name)}
    return DistillationOptions(**given, engine=engine, use_chat_template=options.chat_template)


def read_arguments(texts: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs, whose values are read as YAML; commas may separate pairs, as in lm-eval."""
    import yaml

    arguments = {}
    for text in (part for given in texts for part in given.split(",") if part):
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--model-args {text!r} is not KEY=VALUE")
        arguments[key] = yaml.safe_load(value)
    return arguments
