"""``sekd evaluate``."""

import argparse
import importlib.util
import os
import signal
from typing import Any

from sekd.cli.common import Stopped, WrongInput, reading_input

DESCRIPTION = """\
Evaluate models on benchmarks, and compare them with the first one.

The suite `paper` has zero-shot accuracy on HellaSwag, PIQA, ARC-Easy, GSM8K and LAMBADA with their mean, the perplexity
on LAMBADA, the calibration error, and IFEval. `validation` has ARC-Easy, GSM8K, HellaSwag and PIQA on other rows.
--tasks takes arc_challenge, svamp, aime25, and every task of lm-eval. A split may follow a task: gsm8k@train[:500].

A MODEL is a folder or a hub id, of a whole model or an adapter. Its results are in a folder of its own below --output:
results.json and samples.parquet. The same command again computes only what is missing, also after Ctrl-C.

examples:
  sekd evaluate HuggingFaceTB/SmolLM2-135M-Instruct --suite paper
  sekd evaluate start_model my_run/ --tasks gsm8k svamp --limit 200
  sekd evaluate my_run/ --suite paper --data-dir data/eval data/gsm8k          # without the hub
  sekd evaluate my_run/ --tasks aime25 --repeats 16 --temperature 0.6 --max-new-tokens 8192
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.usage = f"{parser.prog} MODEL [MODEL ...] [--suite NAME ...] [--tasks NAME ...] [options]"
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a folder or hub id; the first is compared with")
    add = parser.add_argument_group("what is evaluated").add_argument
    add("--suite", nargs="+", default=[], action="extend", metavar="NAME", help="paper or validation")
    add("--tasks", nargs="+", default=[], action="extend", metavar="NAME", help="tasks beside or instead of a suite")
    add("--data-dir", nargs="+", default=[], action="extend", metavar="DIR", help="folders with TASK/SPLIT.jsonl files")
    add("--limit", type=int, metavar="N", help="only the first N items of each task")
    add("--shots", type=int, metavar="N", help="few-shot examples (0; of other lm-eval tasks their own number)")
    add("--chat-template", action="store_true", help="the prompts are chats, in the model's template")
    add("--seed", type=int, default=0, metavar="N", help="of few-shot examples and sampling (%(default)s)")
    add = parser.add_argument_group("generated answers").add_argument
    add("--repeats", type=int, default=1, metavar="K", help="sample K answers of each prompt: avg@K and pass@K")
    add("--temperature", type=float, metavar="T", help="0 takes the likeliest token (0; with --repeats 1)")
    add("--top-p", type=float, default=1.0, metavar="P", help="the share of probability that is sampled from (1)")
    add("--max-new-tokens", type=int, metavar="N", help="length of an answer (the task's own, or 256)")
    add = parser.add_argument_group("how models run").add_argument
    add("--backend", choices=("vllm", "hf"), help="vLLM or transformers (vllm where it is installed)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="of the weights (the faster one on this machine)")
    add("--batch-size", type=_read_batch_size, metavar="N", help="auto (a size that fits) or a number (auto)")
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


def run(options: argparse.Namespace) -> int:
    names = [name for given in (*options.suite, *options.tasks) for name in given.split(",") if name]
    with reading_input():
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError("sekd evaluate needs lm-eval: pip install 'sekd[eval]'")
        from sekd.eval.backends import EvaluationRefused
        from sekd.eval.benchmark import evaluate_models
        from sekd.eval.compare import show_table, write_comparison
        from sekd.eval.tasks import SUITES, resolve

        tasks, how = resolve(names), read_options(options)
    try:
        results = evaluate_models(options.models, tasks, how)
    except EvaluationRefused as error:
        raise WrongInput(str(error)) from error
    except KeyboardInterrupt as error:
        raise Stopped(str(error) or "stopped", 128 + signal.SIGINT) from error
    except OSError as error:
        raise Stopped(f"stopped: {error}; what is done is kept, and the same command goes on") from error
    suites = [name for name in names if name in SUITES]
    show_table(results, *suites)
    write_comparison(how.output, results, *suites)
    print(f"the results are in {how.output}, with comparison.csv and comparison.md")
    return 0


def read_options(options: argparse.Namespace) -> Any:
    """The options of an evaluation; ValueError for a number out of its range."""
    from sekd.eval.benchmark import EvaluationOptions
    from sekd.eval.harness import TaskOptions

    task = TaskOptions(
        shots=options.shots,
        limit=options.limit,
        seed=options.seed,
        data_dirs=tuple(options.data_dir),
        chat_template=options.chat_template,
        max_new_tokens=options.max_new_tokens,
        repeats=options.repeats,
        temperature=options.temperature,
        top_p=options.top_p,
    )
    return EvaluationOptions(
        task=task,
        output=os.path.expanduser(options.output),
        backend=options.backend,
        dtype=options.dtype,
        batch_size=options.batch_size,
        arguments=read_arguments(options.model_args),
        force=options.force,
    )


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
