"""Fingerprints: hashes that tell samples, data, tokenizers and models apart."""

import hashlib
import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase

DATED_TEMPLATE = (
    "a chat template that writes today's date, as Llama 3's does, needs chat_template_kwargs: {date_string: ...}"
)
"""Why the same data may have other tokens on another day. Errors about other data say so."""


def weights_fingerprint(model: nn.Module) -> str:
    """A quick hash of a model: the name and shape of every weight, and about 1,024 of its values in float32."""
    from sekd.models import causal_lm  # this takes seconds, and a report fingerprints no model

    digest = hashlib.sha256()
    for name, tensor in causal_lm(model).state_dict().items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // 1024)].float().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def check_same_weights(**models: nn.Module | None) -> None:
    """Compare the models' weights over all processes, which must all call this.

    Raises:
        ValueError: weights differ between processes, and whose. It is raised in every process.
    """
    own = {name: weights_fingerprint(model) for name, model in models.items() if model is not None}
    of_processes = gather_object([own])
    if different := [name for name in own if any(other[name] != own[name] for other in of_processes)]:
        raise ValueError(
            f"the weights of the {' and the '.join(different)} differ between the {len(of_processes)} processes; give "
            "models by name, or load them in every process from the same files, with the same seed for new weights and "
            "FSDP_CPU_RAM_EFFICIENT_LOADING=false"
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary and the chat template."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def sample_key(row: Mapping[str, Any]) -> bytes:
    """A name of 16 bytes for a prepared sample: a hash of its content, wherever the sample is in the data.

    The content is its tokens, targets, packed documents and the teacher's own prompt.
    """
    digest = hashlib.blake2b(digest_size=16)
    lengths = row.get("seq_lengths") or [len(row["input_ids"])]
    teacher_prompt = row.get("teacher_prompt_ids")
    for part in (row["input_ids"], row["supervised"], lengths, *([] if teacher_prompt is None else [teacher_prompt])):
        digest.update(len(part).to_bytes(8, "little") + np.asarray(part, dtype=np.int64).tobytes())
    return digest.digest()


def hash_data(dataset: Dataset | IterableDataset) -> str:
    """A quick hash of all samples, in their order: their tokens and targets. Of a stream, the first ones alone."""
    if isinstance(dataset, IterableDataset):
        return hashlib.sha256(b"".join(map(sample_key, islice(dataset, 64)))).hexdigest()[:16]
    digest = hashlib.sha256(str(len(dataset)).encode())
    names = [
        name for name in ("input_ids", "supervised", "seq_lengths", "teacher_prompt_ids") if name in dataset.features
    ]
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        for name in names:
            for lists in table[name].chunks:
                digest.update(np.ascontiguousarray(lists.value_lengths().to_numpy(zero_copy_only=False)).tobytes())
                digest.update(np.ascontiguousarray(lists.flatten().to_numpy(zero_copy_only=False)).tobytes())
    return digest.hexdigest()[:16]


def data_fingerprint(dataset: Dataset) -> str:
    """A hash of the content of all samples (:func:`sample_key`), in their order."""
    return hashlib.blake2b(b"".join(map(sample_key, dataset)), digest_size=16).hexdigest()
