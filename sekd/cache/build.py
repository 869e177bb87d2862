"""Build a cache: the teacher reads every kept sample once, and a few sampled classes of each row are kept.

The teacher reads one sample at a time, and draws are seeded by the sample's key. So the bytes of a sample depend on
nothing but the sample and the settings: not on its neighbours, the order, the process, or where a build was cut off.
"""

import hashlib
import os
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from sekd.cache.codec import MAX_DRAWS, encode
from sekd.cache.store import (
    MANIFEST,
    Store,
    key_of,
    locked,
    read_manifest,
    read_shard,
    sha256,
    shard_name,
    write_manifest,
    write_shard,
)
from sekd.config import SEKDConfig
from sekd.data import Sample, check_same_tokenizer, collate
from sekd.distill import Method, sparse_targets
from sekd.models import (
    check_head,
    freeze,
    load_model,
    load_teacher,
    tokenizer_fingerprint,
    vocab_rows,
    weights_fingerprint,
)
from sekd.samples import choose_samples, prepare_all
from sekd.teachers import LiveTeacher
from sekd.types import Batch

CHUNK_ROWS = 256

MEANINGS = {
    "teacher": "teacher_model_name_or_path, its revision or weights",
    "dtype": "teacher_dtype",
    "tokenizer": "the tokenizer",
    "vocab": "the common vocabulary of student and teacher",
    "data": "the data (dataset_name, dataset_train_split, sample selection, max_length, packing or the template)",
    "class_samples": "class_samples",
    "temperature": "kd_temperature",
    "seed": "seed",
    "max_length": "max_length",
    "packing": "packing",
    "form": "the codec",
    "shard_samples": "the samples of a shard",
}


def fingerprint_of(
    keys: list[bytes],
    teacher: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: SEKDConfig,
    vocab: int,
    shard_samples: int,
) -> dict[str, Any]:
    """Everything that must match for a cache to be this one."""
    name, revision = args.teacher_model_name_or_path, args.teacher_model_revision
    return {
        "teacher": {"name": name, "revision": revision, "weights": weights_fingerprint(teacher)},
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocab": vocab,
        "data": hashlib.blake2b(b"".join(sorted(keys)), digest_size=16).hexdigest(),
        "max_length": args.max_length,
        "packing": args.packing,
        "class_samples": args.class_samples,
        "temperature": args.kd_temperature,
        "seed": args.seed,
        "form": "compressed",
        "shard_samples": shard_samples,
    }


def build_cache(
    dataset: Dataset,
    teacher: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: SEKDConfig,
    vocab: int,
    folder: str,
    shard_samples: int = 256,
) -> Store:
    """Build, or go on with, the cache of the prepared samples ``dataset`` in ``folder``.

    Raises:
        ValueError: settings that cannot be cached, a folder with another cache, or another builder in it.
        OSError: a full disk; what was written stays, and the next call goes on.
    """
    if args.class_samples > MAX_DRAWS:
        raise ValueError(
            f"class_samples {args.class_samples} cannot be cached: counts have 6 bits; use at most {MAX_DRAWS}"
        )
    keys = [key_of(row) for row in dataset]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}  # samples that repeat are kept once
    order = sorted(first.values())
    fingerprint = fingerprint_of(keys, teacher, tokenizer, args, vocab, shard_samples)
    live = LiveTeacher(teacher, vocab)
    # Fixed chunks: the last bits of a logit may depend on how many rows pass the head with it.
    method = replace(Method.of(args, vocab), class_selection="rs_kd", chunk_rows=CHUNK_ROWS)
    with locked(folder):
        _claim(folder, fingerprint)
        bar = tqdm(total=len(order), desc="Building the cache", unit="sample", disable=args.disable_tqdm)
        done = rows = size = 0
        shards = []
        for number, start in enumerate(range(0, len(order), shard_samples)):
            part = order[start : start + shard_samples]
            path = os.path.join(folder, shard_name(number))
            if not _is_whole(path, [keys[i] for i in part]):
                samples = [encode_sample(Sample(**dataset[i]), keys[i], live, method) for i in part]
                write_shard(path, samples)
            shard = _describe(path)
            shards.append(shard)
            done, rows, size = done + len(part), rows + shard["rows"], size + shard["bytes"]
            bar.update(len(part))
            bar.set_postfix_str(f"{size / max(rows, 1):.1f} B a row, {size / done * len(order) / 2**20:.1f} MiB in all")
        bar.close()
        write_manifest(folder, fingerprint, shards)
    return Store(folder)


@torch.no_grad()
def encode_sample(sample: Sample, key: bytes, teacher: LiveTeacher, method: Method) -> tuple[bytes, int, int, bytes]:
    """(key, rows, classes, data) of a sample."""
    device: Any = teacher.model.device
    batch = Batch(**{name: tensor.to(device) for name, tensor in collate([sample], 0).items()})
    rows = teacher.rows(batch)
    draws = sample_draws(key, method.seed, len(rows[0]), method.class_samples)
    target = sparse_targets(teacher, rows, draws.to(device), method)
    counts = (target.probs * method.class_samples).round().long().cpu().numpy()
    return key, len(counts), int((counts > 0).sum()), encode(target.ids.cpu().numpy(), counts, teacher.head.classes)


def sample_draws(key: bytes, seed: int, rows: int, draws: int) -> torch.Tensor:
    """The numbers in [0, 1) that choose the classes of a sample, [rows draws]."""
    number = int.from_bytes(hashlib.blake2b(key + seed.to_bytes(8, "little"), digest_size=8).digest(), "little")
    generator = torch.Generator().manual_seed(number % 2**63)
    return torch.rand(rows, draws, generator=generator, dtype=torch.float64)


def _claim(folder: str, fingerprint: dict[str, Any]) -> None:
    """Write an incomplete manifest, or check that the one there is of this cache."""
    if not os.path.exists(os.path.join(folder, MANIFEST)):
        write_manifest(folder, fingerprint, None)
        return
    before = read_manifest(folder)["fingerprint"]
    for name, meaning in MEANINGS.items():
        if before.get(name) != fingerprint[name]:
            raise ValueError(
                f"{folder!r} holds a cache with another value of {meaning} ({before.get(name)}, now "
                f"{fingerprint[name]}); name another folder, or delete it"
            )


def _is_whole(path: str, keys: list[bytes]) -> bool:
    if not os.path.exists(path):
        return False
    try:
        return read_shard(path).column("key").to_pylist() == keys
    except ValueError:
        return False


def _describe(path: str) -> dict[str, Any]:
    batch = read_shard(path)
    return {
        "file": os.path.basename(path),
        "samples": batch.num_rows,
        "rows": sum(batch.column("rows").to_pylist()),
        "classes": sum(batch.column("classes").to_pylist()),
        "bytes": os.path.getsize(path),
        "sha256": sha256(path),
    }


def build_of(
    rows: Dataset | IterableDataset, student: str, args: SEKDConfig, model_init_kwargs: dict[str, Any]
) -> Store:
    """:func:`build_cache` for raw rows and models by name, of the samples that ``sample_fraction`` keeps.

    Only one model is in memory at a time: the student where it scores samples, then the teacher.
    """
    tokenizer, dataset = prepare_all(rows, student, args, model_init_kwargs)
    if args.sample_fraction < 1:
        model = load_model(student, **{"dtype": torch.float32, **model_init_kwargs})
        dataset = dataset.select(choose_samples(dataset, model, None, tokenizer, args)["kept"])
        del model
    name = str(args.teacher_model_name_or_path)
    check_same_tokenizer(tokenizer, AutoTokenizer.from_pretrained(name, revision=args.teacher_model_revision))
    teacher = freeze(load_teacher(name, args, model_init_kwargs.get("attn_implementation"))).to(args.device)
    check_head(teacher, "seq_lengths" in dataset.column_names)
    config = AutoConfig.from_pretrained(student, revision=model_init_kwargs.get("revision") or "main")
    vocab = min(config.get_text_config().vocab_size, vocab_rows(teacher))
    return build_cache(dataset, teacher, tokenizer, args, vocab, str(args.teacher_cache))
