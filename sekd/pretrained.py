"""Names of models: folders and hub ids, their tokenizers and configurations. Errors name the key of the recipe."""

import os
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig

STUDENT, TEACHER = "model_name_or_path", "teacher_model_name_or_path"
CONFIGS = ("config.json", "adapter_config.json")
"""A folder with one of these files holds a model."""
TOKENIZER_FILES = ("tokenizer", "vocab", ".model", ".tiktoken")
"""A part of the name of a tokenizer's file."""


def check_model_name(field: str, name: str) -> None:
    """Raise ValueError for a name that can only be a folder's, if there is no such folder or no model in it."""
    if os.path.isdir(name):
        if not any(os.path.isfile(os.path.join(name, config)) for config in CONFIGS):
            raise ValueError(f"{field} {name!r}: the folder holds no model, since it has no {CONFIGS[0]}")
    elif os.path.exists(name):
        raise ValueError(f"{field} {name!r} is a file; name the folder of the model, or its hub id")
    elif not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise ValueError(f"{field} {name!r}: no such folder")


def load_tokenizer(field: str, name: str, revision: str | None) -> Any:
    """The tokenizer of a model; ValueError if there is none."""
    from transformers import AutoTokenizer

    # From a folder without one, transformers may make a tokenizer without tokens.
    if os.path.isdir(name) and not any(part in file for file in os.listdir(name) for part in TOKENIZER_FILES):
        raise ValueError(f"{field} {name!r}: the folder has no tokenizer; save the model's tokenizer into it")
    return _load(AutoTokenizer.from_pretrained, "tokenizer", field, name, revision)


def find_adapter(name: str, revision: str | None = None) -> "PeftConfig | None":
    """The configuration of the adapter that a folder or hub id holds; None for a whole model.

    Raises:
        ValueError: a folder holds both, or the adapter does not name its base.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(name, revision=revision) is None:
        return None
    from peft import PeftConfig

    if os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(
            f"{name!r} holds a whole model (config.json) and an adapter (adapter_config.json), perhaps of two runs; "
            "move the files of one of them to another folder"
        )
    adapter = PeftConfig.from_pretrained(name, revision=revision)
    if adapter.base_model_name_or_path is None:
        raise ValueError(f"the adapter {name!r} lacks base_model_name_or_path: add it to its adapter_config.json")
    if os.path.isabs(adapter.base_model_name_or_path) and not os.path.isdir(adapter.base_model_name_or_path):
        raise ValueError(
            f"the base of the adapter {name!r} is gone: {adapter.base_model_name_or_path!r}; name the folder where it "
            "is now in base_model_name_or_path of its adapter_config.json"
        )
    return adapter


def load_config(field: str, name: str, revision: str | None) -> Any:
    """The configuration of a model, or of the base below an adapter; ValueError if there is none."""
    from transformers import AutoConfig

    adapter = find_adapter(name, revision)
    if adapter is not None:
        name, revision = str(adapter.base_model_name_or_path), adapter.revision
    return _load(AutoConfig.from_pretrained, "configuration", field, name, revision)


def _load(load: Callable[..., Any], what: str, field: str, name: str, revision: str | None) -> Any:
    if not os.path.isdir(name):
        check_model_name(field, name)
    try:
        return load(name, revision=revision or "main")
    except (OSError, ValueError) as error:
        reason = textwrap.shorten(str(error), 160, placeholder=" ...")
        if os.path.isdir(name):
            raise ValueError(f"{field} {name!r}: the folder's {what} cannot be loaded: {reason}") from error
        raise ValueError(f"{field} {name!r}: no such folder, and the hub gives no {what}: {reason}") from error
