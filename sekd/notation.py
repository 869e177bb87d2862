"""YAML as recipes have it."""

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML whose 1e-5 is a number, and whose dates are texts."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]\d+$"), [*"-+0123456789"])


def load_yaml(text: str) -> Any:
    """The content of a YAML text.

    Raises:
        ValueError: it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        place = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem}{place}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def read_mapping(kind: str, path: str) -> dict[Any, Any]:
    """The keys and values of a YAML file. ``kind`` is what the file is, for errors.

    Raises:
        ValueError: the file is not YAML, or not a mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = load_yaml(file.read())
    except ValueError as error:
        raise ValueError(f"{kind} {path!r} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{kind} {path!r} is not a mapping of keys to values")
    return content
