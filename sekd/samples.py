"""Which samples? The frozen initial models score them once, and a file keeps the scores.

A sample's score is the mean of a position score over its valid positions (TopSmp, arXiv 2602.01395, section 4; Xu et
al., 2023). Only the kept samples are loaded, so batches have their full size.
"""

import os
import time
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import torch
from accelerate.utils import reduce
from datasets import Dataset, IterableDataset, concatenate_datasets
from jaxtyping import Float
from pyarrow.compute import list_value_length
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sekd.config import SEKDConfig
from sekd.data.batch import Sample, collate
from sekd.data.prepare import is_packed, prepare
from sekd.distill import score_positions
from sekd.files import DamagedFile, read_checked, write_checked
from sekd.fingerprints import DATED_TEMPLATE, data_fingerprint, tokenizer_fingerprint, weights_fingerprint
from sekd.models import common_vocab, find_teacher_device, get_head, hidden_states, place_teacher
from sekd.processes import run_on_main
from sekd.scores import RANDOM, Scoring, needs_teacher
from sekd.teachers.live import LiveTeacher
from sekd.types import Batch, Positions
from sekd.validation.training import check_budget

FORMAT = 2
FIELDS = {
    "sample_score": "sample_score",
    "seed": "seed",
    "tokenizer": "the tokenizer",
    "data": "the data (dataset_name, its split, max_length, packing, supervise_prompt, sample_pool, the template, "
    f"teacher_system_prompt or teacher_prompt_prefix; {DATED_TEMPLATE})",
    "student": "the student's weights (model_name_or_path, model_revision or dtype)",
    "teacher": "the teacher's weights (teacher_model_name_or_path, its revision or teacher_dtype)",
    "precision": "bf16 or fp16",
}


def select_samples(scores: Iterable[float] | Tensor, fraction: float) -> list[int]:
    """Sorted indices of the ceil(fraction * n) highest scores. The ceiling is that of the exact decimal.

    Ties go to the lower index.

    Raises:
        ValueError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"sample_fraction {fraction} is outside (0, 1]; 0.2 keeps 20 % of the samples")
    values = torch.as_tensor(scores if isinstance(scores, Tensor) else list(scores), dtype=torch.float64)
    if values.isnan().any():
        raise ValueError("a sample's score is nan, so samples cannot be ranked; score them again")
    exact = Fraction(str(fraction)) * len(values)
    count = -(-exact.numerator // exact.denominator)
    return sorted(values.argsort(descending=True, stable=True)[:count].tolist())


def take_pool(dataset: Dataset | IterableDataset, size: int) -> Dataset:
    """The first ``size`` samples of prepared data. The samples of a stream are read into memory."""
    if isinstance(dataset, Dataset):
        return dataset.take(min(size, len(dataset)))
    parts, bar = [], tqdm(total=size, desc="Reading the sample pool")
    for part in dataset.take(size).iter(batch_size=1000):  # Arrow needs a tenth of the memory of lists
        parts.append(Dataset.from_dict(part))
        bar.update(len(parts[-1]))
    bar.close()
    return concatenate_datasets(parts)


def prepare_samples(
    rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, args: SEKDConfig
) -> Dataset | IterableDataset:
    """Turn rows into samples: tokenize, pack or cut them, and take the first ``sample_pool`` if it is set.

    Raises:
        ValueError: as :func:`prepare`; a stream has no sample; or ``max_tokens`` is set, and the data is not packed.
    """
    dataset = prepare(rows, tokenizer, args)
    check_budget(args, is_packed(dataset))
    return dataset if args.sample_pool is None else take_pool(dataset, args.sample_pool)


def order_stream(stream: IterableDataset, args: SEKDConfig) -> IterableDataset:
    """The samples of a stream in the order of training: shuffled with ``shuffle_buffer``, several times each with
    ``rollouts_per_prompt``. At its end the stream begins again.

    So a run has one epoch, and a resumed run skips exactly what was read. The Trainer cannot count later epochs of data
    without a length. Only the samples that the run reads are shuffled, so a seed changes their order, but not which
    samples they are.
    """
    times = args.rollouts_per_prompt
    if args.shuffle_buffer:
        in_each_process = args.max_steps * args.sequences_per_step // args.world_size
        needed = -(-in_each_process // times) * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        stream = stream.take(needed).shuffle(seed, buffer_size=args.shuffle_buffer)
    stream = stream.repeat(None)
    return stream if times == 1 else stream.map(_repeat_rows, batched=True, fn_kwargs={"times": times})


def _repeat_rows(rows: Mapping[str, list[Any]], times: int) -> dict[str, list[Any]]:
    return {name: [value for value in values for _ in range(times)] for name, values in rows.items()}


def samples_path(args: SEKDConfig) -> str:
    """The path of the samples file."""
    return args.samples_file or os.path.join(str(args.output_dir), "samples.json")


def choose_samples(
    dataset: Dataset,
    student: nn.Module,
    teacher: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    args: SEKDConfig,
) -> dict[str, Any]:
    """Choose samples, and return the content of the samples file: ``kept`` (sorted ids), ``scores`` and more.

    If the file exists, its scores are used again, for any ``sample_fraction``. ``seconds`` is the time of scoring.
    ``teacher`` may be None if the score does not need it.

    Raises:
        DamagedFile: the file is damaged.
        ValueError: it belongs to other data, models or settings; the error says which.
    """
    path = samples_path(args)
    fingerprint = _fingerprint(dataset, student, teacher, tokenizer, args)
    # Only the main process reads the file, since processes may not share the folder.
    earlier = run_on_main(lambda: _read(path, fingerprint) if os.path.exists(path) else None)
    if earlier is None:
        started = time.monotonic()
        scores = score_samples(dataset, student, teacher, args).tolist()
        earlier = {"scores": scores, "seconds": time.monotonic() - started}
    scores = earlier["scores"]
    choice = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "sample_fraction": args.sample_fraction,
        "kept": select_samples(scores, args.sample_fraction),
        "seconds": earlier.get("seconds"),
        "scores": scores,
    }
    if args.process_index == 0:
        write_checked(path, choice)
    return choice


@torch.no_grad()
def score_samples(
    dataset: Dataset, student: nn.Module, teacher: nn.Module | None, args: SEKDConfig
) -> Float[Tensor, " n"]:
    """The mean of ``args.sample_score`` over the valid positions of each sample, in one pass of the frozen models.

    A prompt without a completion is scored at its own tokens; both models then read the student's prompt. A sample
    without valid positions scores 0. Processes share the work.

    Raises:
        FloatingPointError: a score is not finite. The error names the samples.
    """
    if args.sample_score == RANDOM:
        return torch.rand(len(dataset), generator=torch.Generator().manual_seed(args.seed))
    scoring, source, vocab = Scoring((args.sample_score,)), None, None
    if scoring.needs_teacher:
        assert teacher is not None
        vocab = common_vocab(student, teacher)
        source = LiveTeacher(place_teacher(teacher, find_teacher_device(args)), vocab)
    was_training = student.training
    student.eval()
    student.to(args.device)
    head, scores = get_head(student, vocab), torch.zeros(len(dataset), device=args.device)
    size, longest_first = args.per_device_eval_batch_size, _sort_by_length(dataset)
    shares = range(args.process_index * size, len(dataset), args.world_size * size)
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    total = sum(min(size, len(dataset) - start) for start in shares)
    bar = tqdm(total=total, desc="Scoring samples", disable=args.disable_tqdm or args.process_index > 0)
    for start in shares:
        ids = longest_first[start : start + size]
        samples = [_scorable(Sample(**row)) for row in dataset.select(ids)]
        inputs = {name: tensor.to(args.device) for name, tensor in collate(samples, 0).items()}
        batch = Batch(**inputs)
        with torch.autocast(args.device.type, dtype, enabled=bool(args.bf16 or args.fp16)):
            hidden, targets = hidden_states(student, batch)[batch.valid], batch.targets[batch.valid]
            positions = Positions(hidden, targets, source.read(batch) if source else {})
            head = head.in_autocast_dtype()  # once: later batches find it converted
            at_positions, _ = score_positions(head, source, positions, scoring, args.head_chunk_rows)
        grid = at_positions.new_zeros(batch.valid.shape).masked_scatter(batch.valid, at_positions)
        scores[start : start + len(ids)] = grid.sum(1) / batch.valid.sum(1).clamp(min=1)
        bar.update(len(ids))
    bar.close()
    student.train(was_training)
    scores = reduce(scores, "sum").cpu()[torch.tensor(longest_first).argsort()]
    if not scores.isfinite().all():
        bad = (~scores.isfinite()).nonzero()[:, 0].tolist()
        raise FloatingPointError(f"{args.sample_score} of samples {bad[:8]} is not finite; look at these samples")
    return scores


def _sort_by_length(dataset: Dataset) -> list[int]:
    """The indices of the samples, longest first: samples of a batch are padded to the longest of them."""
    parts = dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=1000)
    lengths = [length for part in parts for length in list_value_length(part["input_ids"]).to_pylist()]
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def _scorable(sample: Sample) -> Sample:
    if not any(sample.supervised[1:]):
        sample.supervised, sample.teacher_prompt_ids = [1] * len(sample.supervised), None
    return sample


def _fingerprint(
    dataset: Dataset,
    student: nn.Module,
    teacher: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    args: SEKDConfig,
) -> dict[str, Any]:
    fingerprint = {
        "sample_score": args.sample_score,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": data_fingerprint(dataset),
    }
    if args.sample_score == RANDOM:
        return fingerprint | {"seed": args.seed}
    fingerprint["precision"] = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    fingerprint["student"] = weights_fingerprint(student)
    if needs_teacher(args.sample_score):
        assert teacher is not None
        fingerprint["teacher"] = weights_fingerprint(teacher)
    return fingerprint


def _read(path: str, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The content of a samples file, after its check."""
    hint = "delete it to score again, or name another samples_file"
    try:
        choice = read_checked(path)  # every value is as it was written
    except DamagedFile as error:
        raise DamagedFile(f"samples_file {error}; {hint}") from error
    if choice.get("format") != FORMAT:
        raise ValueError(f"samples_file {path!r} does not have the format of this version of sekd; {hint}")
    for name, meaning in FIELDS.items():
        if choice["fingerprint"].get(name) != fingerprint.get(name):
            raise ValueError(f"samples_file {path!r} was made with another value of {meaning}; {hint}")
    return choice
