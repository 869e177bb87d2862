"""The files of a trained student: a whole model, or an adapter. A folder never holds files of both."""

import copy
import glob
import os
from typing import Any

import torch
from transformers import PreTrainedModel

from sekd.checkpoints import remove_unfinished
from sekd.files import move_files
from sekd.models import causal_lm
from sekd.on_policy.weights import full_weights
from sekd.run_folder import MODEL_FILES, TOKENIZER_FILES


def replace_student(written: str, folder: str) -> None:
    """Move the files of a written student into a folder, in place of any student there."""
    # First: an adapter's files beside those of a whole model would be loaded with them.
    for pattern in (*MODEL_FILES, *TOKENIZER_FILES):
        for path in glob.glob(os.path.join(glob.escape(folder), pattern)):
            os.remove(path)
    move_files(written, folder)
    remove_unfinished(folder)


def save_merged(model: torch.nn.Module, tokenizer: Any, folder: str, should_save: bool) -> None:
    """Save a student with an adapter as a whole one. Every process must call this; those that ``should_save`` write."""
    merged = merge_adapter(model, should_save)
    if merged is not None:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def merge_adapter(model: torch.nn.Module, keep: bool = True) -> PreTrainedModel | None:
    """A whole student in float32, on the CPU: the base weights with the adapter added. ``model`` does not change.

    Every process must call this. Those that do not ``keep`` the student help to gather its weights, and get None.
    """
    lm = causal_lm(model)
    weights = {}
    for name, tensor in full_weights(model, torch.float32):
        if keep:
            weights[name] = tensor.to("cpu", torch.float32)
    if not keep:
        return None
    with torch.device("meta"):
        whole = type(lm)(copy.deepcopy(lm.config))
    whole.load_state_dict(weights, assign=True)
    whole.tie_weights()
    whole.generation_config = lm.generation_config
    whole._weight_conversions = getattr(lm, "_weight_conversions", None)  # from these names to those of checkpoints
    return whole
