"""The data that comes with the package: methods, the paper's figures, claims, the page's text."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml


def built_in(name: str) -> Any:
    """A YAML file of this folder."""
    return yaml.safe_load(files("hlora.study").joinpath(name).read_text("utf-8"))
