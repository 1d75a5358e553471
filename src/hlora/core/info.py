"""`importance.json`: what an importance folder says of itself. Read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hlora.errors import InputError, StoreError

TENSORS = "importance.safetensors"
MARKER = "importance.json"
FORMAT = 1


def read_info(folder: Path | str) -> dict[str, Any]:
    """`importance.json` alone.

    Raises:
        StoreError: it is missing, or not what hlora writes.
        InputError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no importance folder {folder}: make one with `hlora record`.")
    path = folder / MARKER
    if not path.is_file():
        raise StoreError(
            f"{folder} holds no finished importance ({MARKER} is missing): run `hlora record`, or "
            "go on with --resume if it was interrupted."
        )
    try:
        info = json.loads(path.read_text("utf-8"))
        if info["format"] > FORMAT:
            raise StoreError(
                f"{path} has format {info['format']} and this hlora reads up to {FORMAT}: upgrade "
                "hlora."
            )
        missing = {"kind", "base_model", "pairs", "norms", "files"} - info.keys()
        if missing:
            raise KeyError(*missing)
        _check_shape(info)
    except RecursionError:
        raise StoreError(f"{path} is damaged (nested too deep): record again.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({error}): record again.") from None
    return info


def _check_shape(info: dict[str, Any]) -> None:
    """Raise if what is read of `importance.json` is not of the type that was written."""
    base = info["base_model"]
    mappings = {
        name: {} if info.get(name) is None else info[name]
        for name in (
            "recording",
            "summary",
            "pairs",
            "norms",
            "files",
            "settings",
            "adapter_config",
        )
    }
    mappings |= {"config": base["config"], "samples": base["samples"]}
    entries = (*info["pairs"].values(), *info["files"].values())
    for name, value in (*mappings.items(), *(("an entry", e) for e in entries)):
        if not isinstance(value, dict):
            raise TypeError(f"{name} is no mapping")
    numbers = [*info["norms"].values(), *(f["bytes"] for f in info["files"].values())]
    numbers += [p[k] for p in info["pairs"].values() for k in ("m", "n", "r", "s")]
    numbers += [v for sample in base["samples"].values() for v in sample]
    texts = [info["kind"], info["created"], info["hlora_version"], base["name"] or ""]
    texts += [f["sha256"] for f in info["files"].values()]
    for values, kind in ((numbers, (int, float)), (texts, str)):
        if wrong := [v for v in values if not isinstance(v, kind) or isinstance(v, bool)]:
            raise TypeError(f"{str(wrong[0])[:40]!r} is of another type")
