"""README.md beside a trained student: the hub's model card. It says what was distilled from what, how, and how well.

The card is made from the recipe and the run's log alone, so a resumed run has the card of an undisturbed one, except
for its wall time. Texts of the user are data: no name can break the front matter or a table.
"""

import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id
from transformers import TrainerState
from yaml import YAMLError

from sekd.cache.store import read_manifest
from sekd.config import SEKDConfig
from sekd.data.load import is_local
from sekd.files import write_atomically
from sekd.metric_kinds import find_kind
from sekd.selection_words import describe_selection
from sekd.versions import installed_versions

CARD = "README.md"
MARK = "<!-- sekd writes this file at each save. Delete this line to keep your changes. -->"
TAGS = "sekd", "knowledge-distillation"
LEFT_OUT = re.compile(r"runtime|seconds|per_second|flos|_share$|^(epoch|step)$")
"""Logged numbers that are not in the tables: they differ between equal runs, or stand elsewhere in the card."""

PAPER = """\
```bibtex
@article{tavor2026rethinking,
  title         = {Rethinking Selective Knowledge Distillation},
  author        = {Tavor, Almog and Ebenspanger, Itay and Cnaan, Neil and Geva, Mor},
  year          = {2026},
  eprint        = {2602.01395},
  archivePrefix = {arXiv}
}
```"""

LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

student = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""


@dataclass
class CardSource:
    """What a card is made from, besides the log.

    Attributes:
        args: the configuration of the run.
        keys: the recipe's keys and values. ``dataset_name`` is missing if the data came from Python.
        student, teacher: a folder, a hub id, or "" for a model without a name.
        data: the samples that are trained on.
        processes: the number of training processes.
        is_adapter: the saved student is an adapter, and its base is not saved.
        repository: where the student is uploaded to, or None.
        more: front matter that the caller adds, such as ``license``.
    """

    args: SEKDConfig
    keys: Mapping[str, Any]
    student: str
    teacher: str
    data: Dataset | IterableDataset
    processes: int = 1
    is_adapter: bool = False
    repository: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read now what may be gone when the run ends: a missing file must not cost the student."""
        if not self.teacher and self.args.teacher_cache is not None:
            self.teacher = str(read_manifest(self.args.teacher_cache)["fingerprint"]["teacher"]["name"])
        self.more = {**_find_license(self.student), **self.more}


def write_card(source: CardSource, state: TrainerState, folder: str, kept_in: str) -> None:
    """Write ``README.md`` into ``folder``, whose files then move to ``kept_in``.

    A card that the user wrote in ``kept_in`` stays. PEFT's card in ``folder`` is replaced or removed.
    """
    path, kept = os.path.join(folder, CARD), os.path.join(kept_in, CARD)
    if is_users(kept):
        if path != kept and os.path.exists(path):
            os.remove(path)
        return
    write_atomically(path, make_card(source, state))


def is_users(path: str) -> bool:
    """Whether the file exists without sekd's mark: the user wrote it, or deleted the mark to keep changes."""
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        return MARK not in file.read()


def make_card(source: CardSource, state: TrainerState) -> str:
    """The text of the card."""
    args, teacher = source.args, source.teacher
    what = describe_selection(args, from_cache=args.teacher_cache is not None)
    parts = [
        f"---\n{_make_front_matter(source)}\n---\n{MARK}",
        "# A student of " + (_code(_get_base_name(teacher)) if teacher else "another model"),
        f"This model was trained by selective knowledge distillation: {what}.",
        f"- Student: {_name_model(source.student)}\n- Teacher: {_name_model(teacher)}\n"
        f"- Data: {_describe_data(source)}",
        "## How to load it",
        LOAD.format(folder=source.repository or "path/to/this/folder"),
    ]
    if source.is_adapter:
        parts.append(
            "It is an adapter: PEFT must be installed, and the base that `adapter_config.json` names is loaded with it."
        )
    parts += ["## Training", _make_table(("", "run"), _list_run(source, state))]
    training = [log for log in state.log_history if "loss" in log]
    if training:
        numbers = [(_code(name), _show(name, value)) for name, value in _list_numbers(training[-1])]
        parts += [f"The last log, of step {training[-1]['step']}:", _make_table(("metric", "value"), numbers)]
    parts += _describe_evaluations(args, state)
    versions = {"Python": platform.python_version(), **installed_versions()}
    parts += [
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        "## Citation",
        "The method is from [Rethinking Selective Knowledge Distillation](https://arxiv.org/abs/2602.01395):",
        PAPER,
    ]
    return "\n\n".join(parts) + "\n"


def _make_front_matter(source: CardSource) -> str:
    """What the hub reads. A local folder or file has no name there: its base name might be another model's."""
    eval_data = source.args.eval_dataset_name
    datasets = [name for name in (source.keys.get("dataset_name"), eval_data) if _is_hub_data(name)]
    more = dict(source.more)
    tags = [*TAGS, *(["lora"] if source.is_adapter else []), *_as_list(more.pop("tags", None))]
    return ModelCardData(
        **{
            "base_model": source.student if _is_hub_model(source.student) else None,
            "teacher": source.teacher if _is_hub_model(source.teacher) else None,
            "datasets": [*dict.fromkeys(datasets)] or None,
            "library_name": "peft" if source.is_adapter else "transformers",
            "pipeline_tag": "text-generation",
            **more,
        },
        tags=tags,
    ).to_yaml()


def _as_list(values: Any) -> list[str]:
    return [values] if isinstance(values, str) else [*(values or [])]


def _find_license(student: str) -> dict[str, str]:
    """The license in the card of a local student; the hub is not asked, so that the card needs no network."""
    path = os.path.join(student, CARD)
    if not student or not os.path.isfile(path):
        return {}
    try:
        known = metadata_load(path) or {}
    except (OSError, ValueError, YAMLError):  # not a card
        return {}
    return {key: known[key] for key in ("license", "license_name", "license_link") if isinstance(known.get(key), str)}


def _is_hub_model(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def _is_hub_data(name: str | None) -> bool:
    return bool(name) and not is_local(str(name)) and _is_hub_model(str(name))


def _name_model(name: str) -> str:
    """A link to a model of the hub, or the name of a folder without its path."""
    if not name:
        return "a model that came from Python"
    return f"[{name}](https://huggingface.co/{name})" if _is_hub_model(name) else _code(_get_base_name(name))


def _get_base_name(path: str) -> str:
    return os.path.basename(os.path.normpath(os.path.expanduser(path)))


def _describe_data(source: CardSource) -> str:
    keys, args = source.keys, source.args
    name = keys.get("dataset_name")
    if args.rollouts is not None:
        text = f"the rollouts in {_code(_get_base_name(args.rollouts))}"
    elif name is None:
        text = "data that came from Python"
    else:
        is_hub = _is_hub_data(name)
        text = f"[{name}](https://huggingface.co/datasets/{name})" if is_hub else _code(_get_base_name(name))
        details = ("configuration", keys.get("dataset_config")), ("split", keys.get("dataset_train_split"))
        named = [f"{kind} {_code(value)}" for kind, value in details if value is not None]
        text += f" ({', '.join(named)})" if named else ""
    if isinstance(source.data, IterableDataset):
        return f"{text}, read as a stream"
    return f"{text}: {len(source.data):,} samples of {_count_tokens(source.data):,} tokens"


def _count_tokens(data: Dataset) -> int:
    """The tokens of all samples, from the lengths that Arrow keeps."""
    lengths = pc.list_value_length(data.data.column("input_ids"))
    if data._indices is not None:  # the rows that were chosen
        lengths = lengths.take(data._indices.column(0))
    return pc.sum(lengths).as_py() or 0


def _list_run(source: CardSource, state: TrainerState) -> list[tuple[str, str]]:
    args, keys = source.args, source.keys
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * source.processes
    seconds = [log["train_runtime"] for log in state.log_history if "train_runtime" in log]
    precision = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "float32"
    bits = 4 if args.teacher_load_in_4bit else 8 if args.teacher_load_in_8bit else None
    teacher_precision = f"{bits}-bit" if bits else _code(args.teacher_dtype) if args.teacher_dtype else None
    rows = {
        "optimizer steps": f"{state.global_step:,}",
        "weights of step": _find_best_step(args, state),
        "sequences a step": f"{sequences:,}",
        "longest sequence": f"{args.max_length:,} tokens",
        "longest completion": f"{args.max_completion_length:,} tokens" if args.any_on_policy else None,
        "learning rate": f"{args.learning_rate:g}, {_code(getattr(args.lr_scheduler_type, 'value', 'linear'))}",
        "optimizer": _code(getattr(args.optim, "value", args.optim)),
        "LoRA": f"rank {keys.get('lora_r')}, alpha {keys.get('lora_alpha')}" if keys.get("use_peft") else None,
        "precision": precision + (f", teacher {teacher_precision}" if teacher_precision else ""),
        "seed": str(args.seed),
        "hardware": f"{source.processes} x {_name_device(args.device)}",
        "wall time": f"{seconds[-1]:,.0f} s since the run began or last resumed" if seconds else None,
    }
    return [(name, value) for name, value in rows.items() if value is not None]


def _find_best_step(args: SEKDConfig, state: TrainerState) -> str | None:
    """The step whose weights the student has at the end of the training, if not the last one."""
    return f"{state.best_global_step:,}" if args.load_best_model_at_end and state.best_global_step else None


def _name_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def _describe_evaluations(args: SEKDConfig, state: TrainerState) -> list[str]:
    """The last evaluation beside the best one, by ``metric_for_best_model`` or else the held-out loss."""
    logs = [log for log in state.log_history if any(name.startswith("eval_") for name in log)]
    if not logs:
        return []
    last = best = logs[-1]
    metric = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
    known = [log for log in logs if metric in log]
    if known:
        higher = args.greater_is_better
        if higher is None:
            kind = find_kind(metric)
            higher = kind is not None and bool(kind.higher_is_better)
        best = (max if higher else min)(known, key=lambda log: log[metric])
    shown = [last] if best["step"] == last["step"] else [last, best]
    heads = [f"{name}, step {log['step']}" for name, log in zip(("last", "best"), shown, strict=False)]
    rows = [
        (_code(name), *(_show(name, log[name]) if name in log else "" for log in shown))
        for name, _ in _list_numbers(last)
    ]
    best_by = f"The best evaluation is by {_code(metric)}." if len(shown) > 1 else ""
    return ["## Evaluation", *([best_by] if best_by else []), _make_table(("metric", *heads), rows)]


def _list_numbers(log: Mapping[str, Any]) -> list[tuple[str, float]]:
    numbers = [(name, value) for name, value in log.items() if isinstance(value, int | float)]
    return sorted((name, value) for name, value in numbers if not LEFT_OUT.search(name))


def _show(name: str, value: float) -> str:
    kind = find_kind(name.removeprefix("eval_"))
    if kind is not None and kind.is_share:
        return f"{value * 100:.{kind.digits}f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _make_table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = [*heads]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(value: Any) -> str:
    """Text as code in Markdown: on one line, with nothing that ends the code or the cell of a table."""
    text = " ".join(str(value).split())[:200].replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{space}{text}{space}{fence}"
