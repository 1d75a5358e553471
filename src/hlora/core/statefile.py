"""The state of a recording or a penalty beside a checkpoint: tensors and notes in one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hlora.errors import StoreError


def pack(tensors: dict[str, Tensor], notes: dict[str, Any]) -> bytes:
    """Both as the content of a safetensors file."""
    kept = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    return save(kept, metadata={"hlora": json.dumps(notes)})


def read(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `pack` put into a file.

    Raises:
        StoreError: it is missing or damaged; `what` is the part that wrote it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            return tensors, dict(json.loads(file.metadata()["hlora"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        raise StoreError(
            f"Cannot resume the {what}: {path} is missing or damaged. Resume from a checkpoint "
            f"that was written with the {what} in place, or start again."
        ) from None
