"""The files of a trained student: a whole model, or an adapter. A folder never holds files of both."""

import copy
import glob
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from sekd.models import causal_lm, unwrap
from sekd.on_policy.weights import full_weights
from sekd.student import check_folder

MODEL_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.*"),
)
"""What a model or an adapter may have left in a folder, as patterns."""


def save_student(trainer: Trainer, save: Callable[..., None], folder: str | None, is_internal: bool) -> None:
    """Save the student: in a checkpoint as ``save`` does, elsewhere in place of any that the folder holds.

    With ``merge_adapter`` a student with an adapter becomes a whole one, but not in a checkpoint: training resumes
    from the adapter. Arguments are those of ``Trainer.save_model``, which is ``save``. Every process must call this.
    """
    args: Any = trainer.args
    if is_internal and folder is not None:
        save(folder, is_internal)
        return
    folder = folder or str(args.output_dir)
    for adapter in getattr(unwrap(trainer.model_wrapped), "peft_config", {}).values():
        check_folder(folder, {"the base of the student's adapter": adapter.base_model_name_or_path})
    merged = merge_adapter(trainer.model_wrapped) if args.merge_adapter else None
    if args.should_save:
        # First: files of an adapter beside those of a whole model would be loaded with them.
        for pattern in MODEL_FILES:
            for path in glob.glob(os.path.join(glob.escape(folder), pattern)):
                os.remove(path)
    if merged is None:
        save(folder, is_internal)
        return
    if args.should_save:
        merged.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    if args.push_to_hub and not is_internal:
        trainer.push_to_hub(commit_message="Model save", revision=args.hub_revision)


def merge_adapter(model: torch.nn.Module) -> PreTrainedModel:
    """A whole student in float32, on the CPU: the base weights with the adapter added. ``model`` does not change.

    Every process must call this.
    """
    lm = causal_lm(model)
    weights = {name: tensor.to("cpu", torch.float32) for name, tensor in full_weights(model, torch.float32)}
    with torch.device("meta"):
        whole = type(lm)(copy.deepcopy(lm.config))
    whole.load_state_dict(weights, assign=True)
    whole.tie_weights()
    whole.generation_config = lm.generation_config
    whole._weight_conversions = getattr(lm, "_weight_conversions", None)  # from these names to those of checkpoints
    return whole
