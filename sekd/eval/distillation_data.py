"""What an evaluation of a distillation reads: its options, texts, prompts and answers. No model is loaded here."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rollouts import ENGINES, Sampling
from sekd.config import SEKDConfig
from sekd.data.batch import Sample
from sekd.data.load import load_rows
from sekd.data.prepare import check_same_tokenizer, prepare
from sekd.eval.backends import FIELD as STUDENT
from sekd.eval.backends import choose_model_dtype, load_model_tokenizer
from sekd.eval.divergence import ROLLOUTS, TEXT
from sekd.eval.result_files import fingerprint_model
from sekd.eval.task_data import hash_rows
from sekd.pretrained import check_model_name, load_config
from sekd.student import count_positions
from sekd.validation.teachers import check_bits
from sekd.validation.values import is_installed

VERSION = 2
"""Goes up when the same model and data would get other numbers."""
TEACHER = "--teacher"
"""How errors name the argument."""
ANY_LENGTH = 1 << 30
"""The limit on prompts while they are encoded; the models' positions limit them afterwards."""
GPU_SHARE = 0.8
"""vLLM's share of a GPU's memory; no other model is there while it generates."""
ENCODING = (
    *("prompt_column", "completion_column", "messages_column", "text_column"),
    *("prompt_template", "use_chat_template", "system_prompt"),
)
"""The fields of :class:`DistillationOptions` that say how a row becomes tokens: keys of a recipe too."""


@dataclass(frozen=True)
class DistillationOptions:
    """What is measured, and how. ``text`` or ``prompts`` must be given.

    Attributes:
        teacher: a folder or hub id, of a whole model or an adapter.
        text: a file, folder or hub id with texts, prompts and completions, or conversations.
        prompts: a file, folder or hub id with prompts; the student completes them.
        text_split, prompts_split: which rows, such as ``test`` or ``train[:100]``.
        answer_column: the column of ``prompts`` with the right answers; without it no answer is checked.
        text_prompt_length: the first tokens of each document in ``prompts`` are the prompt; for plain text.
        max_length: tokens of a text; longer ones are cut.
        limit: only the first rows.
        repeats: completions of each prompt.
        temperature: of sampling; 0 takes the likeliest token. The divergences are at temperature 1 in any case.
        top_p: the share of the probability that is sampled from.
        max_new_tokens: length of a completion.
        engine: generates the completions (``vllm`` or ``hf``); None for vLLM where it is installed.
        dtype: of both models; None for the faster of bfloat16 and float32 on this machine.
        teacher_load_in_4bit, teacher_load_in_8bit: hold the teacher in 4 or 8 bits, as in training.
        batch_size: sequences that both models read at once.

    The other fields are keys of a recipe: ``prompt_column`` and so on.

    Raises:
        ValueError: a value is out of its range, or nothing is to be measured.
    """

    teacher: str
    text: str | None = None
    prompts: str | None = None
    text_split: str = "train"
    prompts_split: str = "train"
    answer_column: str | None = None
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    messages_column: str = "messages"
    text_column: str = "text"
    prompt_template: str = "{prompt}"
    use_chat_template: bool = False
    system_prompt: str | None = None
    text_prompt_length: int | None = None
    max_length: int = 1024
    limit: int | None = None
    seed: int = 0
    repeats: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    engine: str | None = None
    dtype: str | None = None
    teacher_load_in_4bit: bool = False
    teacher_load_in_8bit: bool = False
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.text is None and self.prompts is None:
            raise ValueError(
                "the suite distillation needs --text FILE, --prompts FILE, or both: which tokens to measure"
            )
        for name, low in (("limit", 1), ("repeats", 1), ("max_new_tokens", 1), ("batch_size", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} {value} must be at least {low}")
        if self.repeats > 1 and self.temperature == 0:
            raise ValueError(
                f"repeats {self.repeats} at temperature 0 repeats one completion; set a temperature above 0"
            )
        check_bits(self.teacher_load_in_4bit, self.teacher_load_in_8bit)
        engines = [name for name, engine in ENGINES.items() if not engine.uses_servers]
        if self.chosen_engine not in engines:
            raise ValueError(f"engine {self.engine!r} cannot generate here; choose one of {', '.join(engines)}")
        requires = ENGINES[self.chosen_engine].requires
        if self.prompts is not None and requires is not None and not is_installed(requires):
            raise ValueError(f"engine {self.engine!r} needs {requires}, which is not installed; choose engine hf")

    @property
    def chosen_engine(self) -> str:
        """The engine, or the default one."""
        return self.engine or ("vllm" if is_installed("vllm") else "hf")

    @property
    def chosen_dtype(self) -> str:
        """The dtype, or the default one."""
        return choose_model_dtype(self.dtype)

    @property
    def teacher_bits(self) -> int | None:
        """4 or 8 if the teacher is quantized."""
        return 4 if self.teacher_load_in_4bit else 8 if self.teacher_load_in_8bit else None

    @property
    def samples_as_is(self) -> bool:
        """Whether completions are drawn from the student's own distribution, neither sharpened nor truncated."""
        return Sampling(temperature=self.temperature, top_p=self.top_p).is_unchanged


@dataclass(frozen=True)
class Distillation:
    """What is measured of a student: read and checked, before any model is loaded.

    Attributes:
        texts, prompts: the samples of the tasks ``text`` and ``rollouts``; empty without the task.
        answers: the right answer of each prompt; None if no answer is checked.
        settings: of each task, what its numbers depend on beside the student.
    """

    student: str
    options: DistillationOptions
    tokenizer: PreTrainedTokenizerBase
    texts: list[Sample] = field(default_factory=list)
    prompts: list[Sample] = field(default_factory=list)
    answers: list[str] | None = None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


def configure(options: DistillationOptions, **more: Any) -> SEKDConfig:
    """The options as the record that encoders and engines read."""
    return SEKDConfig(
        **{name: getattr(options, name) for name in ENCODING},
        **{"output_dir": "unused", **more},
        packing=False,
        report_to="none",
        rollout_engine=options.chosen_engine,
        temperature=options.temperature,
        top_p=options.top_p,
        max_completion_length=options.max_new_tokens,
        seed=options.seed,
        bf16=options.chosen_dtype == "bfloat16",
        fp16=options.chosen_dtype == "float16",
        vllm_gpu_memory_utilization=GPU_SHARE,
    )


def prepare_distillation(student: str, options: DistillationOptions) -> Distillation:
    """Read and check everything that can be wrong before a model is loaded: tokenizers, rows, lengths.

    Raises:
        ValueError: a model without configuration or tokenizer, different tokenizers, an empty or unreadable file, a
            missing column, several completions without answers, a prompt that is too long, or no grader of answers.
    """
    models = {STUDENT: student, TEACHER: options.teacher}
    for role, name in models.items():
        check_model_name(role, name)
    configs = [load_config(role, name, None) for role, name in models.items()]
    tokenizer = load_model_tokenizer(student)
    check_same_tokenizer(tokenizer, load_model_tokenizer(options.teacher, TEACHER))
    limit = min(count_positions(config) for config in configs)
    common = {
        "version": VERSION,
        "teacher": fingerprint_model(options.teacher),
        "limit": options.limit,
        "dtype": options.chosen_dtype,
        **{name: value for name in (*ENCODING, "teacher_bits") if (value := getattr(options, name)) is not None},
    }
    texts, prompts, answers, settings = list[Sample](), list[Sample](), None, dict[str, dict[str, Any]]()
    if options.text is not None:
        rows = _load("text", options.text, options.text_split, options.limit)
        texts = _encode_texts(rows, tokenizer, options)
        _check_lengths("text", texts, 0, limit)
        settings[TEXT] = common | _describe_rows(rows, options.text_split) | {"max_length": options.max_length}
    if options.prompts is not None:
        rows = _load("prompts", options.prompts, options.prompts_split, options.limit)
        answers = _read_answers(rows, options)
        prompts = _encode_prompts(rows, tokenizer, options)
        _check_lengths("prompts", prompts, options.max_new_tokens, limit)
        settings[ROLLOUTS] = common | _describe_rows(rows, options.prompts_split) | _describe_sampling(options)
    return Distillation(student, options, tokenizer, texts, prompts, answers, settings)


def _load(field: str, name: str, split: str, limit: int | None) -> Dataset:
    rows: Any = load_rows(name, split=split, field=field)
    if not len(rows):
        raise ValueError(f"{field} {name!r}: split {split!r} has no rows")
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _describe_rows(rows: Dataset, split: str) -> dict[str, Any]:
    return {"split": split, "data": hash_rows(rows), "rows": len(rows)}


def _describe_sampling(options: DistillationOptions) -> dict[str, Any]:
    names = ("answer_column", "text_prompt_length", "seed", "repeats", "temperature", "top_p", "max_new_tokens")
    return {name: getattr(options, name) for name in names} | {"backend": options.chosen_engine}


def _encode(rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: SEKDConfig) -> list[Sample]:
    """The samples of rows, without the bars that ``datasets`` shows for each of its steps."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return [Sample(**row) for row in prepare(rows, tokenizer, args)]
    finally:
        if shown:
            datasets.enable_progress_bars()


def _encode_texts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, options: DistillationOptions) -> list[Sample]:
    length = options.max_length
    args = configure(options, max_length=length, max_prompt_length=length - 1, overlong_prompts="drop")
    samples = _encode(rows, tokenizer, args)
    if len(samples) < len(rows) and samples[0].prompt_length:
        raise ValueError(
            f"text {options.text!r}: {len(rows) - len(samples)} of {len(rows)} rows have no token to measure among the "
            f"first {length}, since their prompts are longer; raise max_length"
        )
    return samples


def _encode_prompts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, options: DistillationOptions) -> list[Sample]:
    name, columns, length = options.prompts, rows.column_names, options.text_prompt_length
    has_prompts = any(column in columns for column in (options.prompt_column, options.messages_column, "prompt_ids"))
    if options.text_column in columns and not has_prompts and length is None:
        raise ValueError(
            f"prompts {name!r} is plain text (column {options.text_column!r}): set text_prompt_length to the number of "
            "first tokens of a document that are its prompt, or prompt_column to the column of the prompts"
        )
    # The completions are not read. They may be answers in another form than the prompts.
    rows = rows.remove_columns([options.completion_column] if options.completion_column in columns else [])
    args = configure(options, lmbda=1.0, max_prompt_length=ANY_LENGTH, text_prompt_length=length)
    samples = _encode(rows, tokenizer, args)
    if len(samples) < len(rows) and (length is None or options.answer_column is not None):
        raise ValueError(
            f"prompts {name!r}: {len(rows) - len(samples)} of {len(rows)} prompts are empty; drop these rows"
        )
    return samples


def _read_answers(rows: Dataset, options: DistillationOptions) -> list[str] | None:
    column, columns = options.answer_column, ", ".join(map(repr, rows.column_names))
    if column is None and options.repeats > 1:
        k = options.repeats
        raise ValueError(
            f"repeats {k} without right answers gives no avg@{k}: name their column with answer_column; the columns of "
            f"{options.prompts!r} are {columns}"
        )
    if column is None:
        return None
    if column not in rows.column_names:
        raise ValueError(f"answer_column {column!r}: {options.prompts!r} lacks it; its columns are {columns}")
    from sekd.eval.answers import check_grader

    check_grader()
    return [_read_answer(value, column) for value in rows[column]]


def _read_answer(value: Any, column: str) -> str:
    """The answer of a row: text, a number, or the last message of a chat."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if isinstance(value, int | float):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"answer_column {column!r} holds {value!r}, which is no answer; drop such rows")
    return value


def _check_lengths(field: str, samples: Sequence[Sample], new: int, limit: float) -> None:
    """Raise ValueError for a sequence that is longer than the models can read."""
    longest = max(s.prompt_length + new if new else len(s.input_ids) for s in samples)
    if longest <= limit:
        return
    what, remedy = f"the longest sequence has {longest} tokens", "lower max_length"
    if new:
        what = f"the longest prompt has {longest - new} tokens, {longest} with max_new_tokens {new}"
        remedy = "lower max_new_tokens, or shorten the prompts"
    raise ValueError(f"{field}: {what}, and the models have {limit:g} positions (max_position_embeddings); {remedy}")
