"""JSON and YAML that others wrote: one error for whatever is wrong with it."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from hlora.errors import InputError, one_line


def parse_json(text: str, where: str) -> Any:
    """JSON, whatever is in it.

    Raises:
        InputError: it is none, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{where}: nested too deep to be read.") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}).") from None


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A mapping from YAML, in which every plain value but null is text.

    YAML 1.1 takes `no` for False and `1e-2` for text; a value's type is its setting's to know.

    Args:
        what: what the file is, for the error.

    Raises:
        InputError: it cannot be read, is no mapping, is nested too deep, or refers to itself.
    """
    try:
        values = parse_yaml(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"The {what} {path} cannot be read: {one_line(error, 300)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"The {what} {path} must map names to values.")
    return values


def packaged(room: str, name: str) -> Any:
    """A YAML file of ours, from a room of the package."""
    import yaml

    return yaml.safe_load(files(f"hlora.{room}").joinpath(name).read_text("utf-8"))


def parse_yaml(text: str) -> Any:
    """YAML as `read_yaml` has it.

    Raises:
        ValueError: it is none.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, form) for tag, form in found if tag.endswith((":null", ":merge"))]
            for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines of them can mean gigabytes
                raise ValueError(f"the alias *{self.peek_event().anchor} is not supported")
            return super().compose_node(parent, index)

    try:
        # It is a SafeLoader, with fewer types.
        return yaml.load(text, Loader)  # nosec B506
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except Exception as error:  # a tag on what is none, such as `!!timestamp x`, raises anything
        raise ValueError(f"it is not YAML: {error}") from None
