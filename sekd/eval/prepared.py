"""A task before a model is loaded: its rows, its settings, and the requests that a model will get."""

import contextlib
import copy
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from jinja2 import TemplateError

from sekd.eval.task_data import hash_rows, load_task_rows
from sekd.eval.tasks import TASKS, TaskSpec, check_lm_eval, index_lm_eval

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The names that lm-eval knows for the length of an output; the first one that is given counts."""
BAD_ROWS = (ValueError, KeyError, TypeError, AttributeError, IndexError, TemplateError)
"""What lm-eval's templates and functions raise where a row is not as they expect."""
DEFAULT_LENGTH = 256
"""Tokens of an output where neither the user nor the task says otherwise: lm-eval's default."""


@dataclass(frozen=True)
class TaskOptions:
    """How a task is evaluated.

    Attributes:
        shots: few-shot examples; None for none in ``TASKS``, and for the task's own number in lm-eval's other tasks.
        limit: only the first rows of the split; None for all.
        seed: of the few-shot examples and of sampling.
        data_dirs: folders with the rows; without any they come from the hub.
        chat_template: the prompts are chats, in the model's template; few-shot examples are turns.
        max_new_tokens: length of an output; None for the task's own, or lm-eval's 256.
        repeats: outputs of each prompt. Several are sampled.
        temperature: 0 takes the likeliest token. None is 0 for one output, and 1 for several.
        top_p: the share of the probability that is sampled from.

    Raises:
        ValueError: a number is out of its range.
    """

    shots: int | None = None
    limit: int | None = None
    seed: int = 0
    data_dirs: tuple[str, ...] = ()
    chat_template: bool = False
    max_new_tokens: int | None = None
    repeats: int = 1
    temperature: float | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, low in (("shots", 0), ("limit", 1), ("seed", 0), ("max_new_tokens", 1), ("repeats", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} {value} must be at least {low}")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be a finite number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be greater than 0 and at most 1")
        if self.repeats > 1 and self.temperature == 0:
            raise ValueError(
                f"repeats {self.repeats} at temperature 0 gives the same output each time; set a temperature above 0, "
                "or leave it out for 1"
            )


DEFAULTS = TaskOptions()


@dataclass(frozen=True)
class PreparedTask:
    """A task whose rows are loaded and checked; no model is needed so far.

    Attributes:
        settings: what the numbers depend on beside the model and the backend.
        generated: whether outputs are generated; else log-likelihoods are computed.
        max_new_tokens: the length of an output; 0 if none is generated.
        instances: lm-eval's requests, without a chat template.
    """

    name: str
    options: TaskOptions
    settings: dict[str, Any]
    generated: bool
    max_new_tokens: int
    instances: "list[Instance]"
    task: "ConfigurableTask"
    spec: TaskSpec | None

    @property
    def requests(self) -> int:
        """How many requests a model gets: the length of a progress bar."""
        return sum(instance.repeats or 1 for instance in self.instances) * self.options.repeats

    @property
    def texts(self) -> list[str]:
        """What a model reads: each prompt, with the continuation whose log-likelihood is asked for."""
        return ["".join(a for a in instance.args if isinstance(a, str)) for instance in self.instances]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed: neither lm-eval's log lines, nor its bar while it builds requests, nor those of datasets."""
    with without_logs(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def without_logs() -> Iterator[None]:
    """lm-eval and datasets log nothing below critical: what is wrong is raised."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def prepare_task(name: str, split: str | None = None, options: TaskOptions = DEFAULTS) -> PreparedTask:
    """Load and check the rows of a task, and build the requests: all that can be wrong before a model is loaded.

    Args:
        name: a task of ``TASKS`` or of lm-eval.
        split: such as ``test`` or ``train[:500]``; None for the task's own.
        options: see ``TaskOptions``.

    Raises:
        ValueError: the rows are missing or damaged (see ``load_task_rows``), or an option does not fit the task.
    """
    spec = TASKS.get(name)
    config = _load_config(name, spec)
    output_type, shots = config.get("output_type", "generate_until"), _choose_shots(name, config, spec, options)
    generated = output_type == "generate_until"
    if options.repeats > 1 and not generated:
        raise ValueError(f"{name}: repeats {options.repeats} is for generated outputs; this task has log-likelihoods")
    if options.repeats > 1 and config.get("repeats", 1) > 1:
        raise ValueError(f"{name}: lm-eval itself samples {config['repeats']} outputs of each prompt; set repeats to 1")
    settings: dict[str, Any] = {"split": split or _find_split(config), "shots": shots, "limit": options.limit}
    if generated:
        config["generation_kwargs"] = _choose_sampling(config.get("generation_kwargs"), options)
    task = _build_task(name, config, settings, spec, split, options)
    task.set_fewshot_seed(options.seed)
    with quiet():
        try:
            task.build_all_requests(limit=options.limit)
        except (*BAD_ROWS, AssertionError) as error:
            raise ValueError(f"{name}: a row of split {settings['split']} makes no prompt: {error}") from error
    rows = [row for _, row in task.doc_iterator(limit=options.limit)]
    settings |= {
        "version": str(task.VERSION),
        "seed": options.seed,
        "chat_template": options.chat_template,
        "data": hash_rows(rows, spec.columns if spec else ()),
        "rows": len(rows),
        "lm_eval": version("lm-eval"),
    }
    length = 0
    if generated:
        sampling = config["generation_kwargs"]
        length = sampling["max_gen_toks"]
        settings |= {"repeats": options.repeats, "temperature": float(sampling.get("temperature", 0.0))}
        settings |= {"top_p": options.top_p, "max_new_tokens": length}
    return PreparedTask(name, options, settings, generated, length, task.instances, task, spec)


def _load_config(name: str, spec: TaskSpec | None) -> dict[str, Any]:
    """lm-eval's configuration of a task, with its functions.

    Raises:
        ValueError: lm-eval is not installed, or the task is a class of lm-eval that cannot take other data.
    """
    check_lm_eval()
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    if spec is not None and spec.setup is not None:
        spec.setup()
    if spec is not None and isinstance(spec.config, dict):
        return copy.deepcopy(spec.config)
    if spec is not None:
        path = os.path.join(os.path.dirname(lm_eval.tasks.__file__), str(spec.config))
    else:
        path = str(index_lm_eval()[name].yaml_path)
    with quiet():
        config = dict(load_yaml(path, resolve_func=True))
    if "class" in config:
        raise ValueError(
            f"{name}: lm-eval defines this task by a class, which sekd cannot evaluate; use lm_eval itself"
        )
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    return config


def _find_split(config: dict[str, Any]) -> str:
    return config.get("test_split") or config.get("validation_split") or "test"


def _choose_shots(name: str, config: dict[str, Any], spec: TaskSpec | None, options: TaskOptions) -> int:
    """The number of few-shot examples. Where lm-eval fixes it at 0 it cannot be changed."""
    own = 0 if spec is not None else config.get("num_fewshot") or 0
    if options.shots is None or options.shots == own:
        return own
    if (spec is not None and spec.shots_split is None) or config.get("num_fewshot") == 0:
        raise ValueError(f"{name}: shots {options.shots}: this task has no few-shot examples; leave shots out")
    return options.shots


def _choose_sampling(own: dict[str, Any] | None, options: TaskOptions) -> dict[str, Any]:
    """The keys of a generated output: the task's, and what the options change."""
    sampling = dict(own or {})
    lengths = [sampling.pop(name) for name in LENGTH_NAMES if name in sampling]
    sampling["max_gen_toks"] = int(options.max_new_tokens or (lengths[0] if lengths else DEFAULT_LENGTH))
    temperature = options.temperature if options.temperature is not None else 1.0 if options.repeats > 1 else None
    if temperature is not None and temperature > 0:
        # top_k 0 is all classes, for vLLM and for transformers, whose own default are the 50 likeliest.
        sampling |= {"do_sample": True, "temperature": temperature, "top_p": options.top_p, "top_k": 0}
    elif temperature is not None:
        sampling |= {"do_sample": False, "temperature": 0.0}
    return sampling


def _build_task(
    name: str,
    config: dict[str, Any],
    settings: dict[str, Any],
    spec: TaskSpec | None,
    split: str | None,
    options: TaskOptions,
) -> "ConfigurableTask":
    """lm-eval's task, whose rows are those of ``load_task_rows``."""
    from lm_eval.tasks import TaskManager

    shots, own_split = settings["shots"], _find_split(config)
    config["num_fewshot"] = shots
    if spec is not None or options.data_dirs or split is not None:
        splits = {own_split: _load_rows(name, settings["split"], config, options)}
        pool = _find_pool(config)
        if not shots:
            config |= dict.fromkeys(("training_split", "validation_split", "fewshot_split", "fewshot_config"))
            config["test_split"] = own_split
        elif pool is not None and pool != own_split:
            examples = _load_rows(name, pool, config, options)
            if settings["split"].partition("[")[0] == pool:
                examples = _remove_rows(examples, splits[own_split])
            splits[pool] = examples
            settings["shots_data"] = hash_rows(examples, spec.columns if spec else ())
        config["custom_dataset"] = lambda **_: splits
    config.setdefault("task", name)
    with quiet():
        try:
            return TaskManager(include_defaults=False).load([config])["tasks"][config["task"]]
        except (*BAD_ROWS, OSError) as error:
            raise ValueError(f"{name}: lm-eval cannot read the rows of split {settings['split']}: {error}") from error


def _load_rows(name: str, split: str, config: dict[str, Any], options: TaskOptions) -> Dataset:
    hub = (config.get("dataset_path") or "", config.get("dataset_name"))
    with quiet() if options.data_dirs else contextlib.nullcontext():  # a download shows its progress
        return load_task_rows(name, split, options.data_dirs, hub)


def _find_pool(config: dict[str, Any]) -> str | None:
    """The split of the few-shot examples, by lm-eval's rule; None if they stand in the configuration."""
    own = config.get("fewshot_config") or {}
    split = own.get("split") or config.get("fewshot_split")
    if split is None and own.get("samples") is not None:
        return None
    return split or config.get("training_split") or config.get("validation_split")


def _remove_rows(rows: Dataset, removed: Dataset) -> Dataset:
    """The rows that are not among the others: no few-shot example is a question of the evaluation."""
    hashes = {hash_rows([row]) for row in removed}
    return rows.select([i for i, row in enumerate(rows) if hash_rows([row]) not in hashes])
