"""An adapter on disk, in PEFT's published format: B and A by the name of their matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, isfinite

from hlora.errors import StoreError
from hlora.files import ADAPTER_FILES as ADAPTER_FILES


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's settings, without where its base model lies.

    Raises:
        StoreError: they cannot be read.
    """
    try:
        config = dict(json.loads((folder / ADAPTER_FILES[0]).read_text("utf-8")))
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise StoreError(f"{folder / ADAPTER_FILES[0]} cannot be read ({error}).") from None
    return {k: v for k, v in config.items() if k not in ("base_model_name_or_path", "revision")}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All that the adapter's file holds, as PEFT names it.

    Raises:
        StoreError: it is damaged, or holds values that are not finite.
    """
    try:
        tensors = load_file(folder / ADAPTER_FILES[1])
    except (ValueError, SafetensorError, OSError) as error:
        raise StoreError(f"The adapter in {folder} cannot be read ({error}).") from None
    for key, value in tensors.items():
        if not isfinite(value).all():
            raise StoreError(f"{folder / ADAPTER_FILES[1]} is damaged: {key} is not finite.")
    return tensors


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """The adapter in a folder: its config and (B, A) by the pair's name.

    Raises:
        StoreError: a file is missing or damaged, or holds values that are not finite.
    """
    for file in ADAPTER_FILES:
        if not (folder / file).is_file():
            raise StoreError(f"{folder} holds no LoRA adapter: {file} is missing.")
    config, tensors = read_config(folder), read_tensors(folder)
    factors: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        for which in ("lora_A", "lora_B"):
            if key.endswith(f".{which}.weight"):
                name = key.removeprefix("base_model.model.").removesuffix(f".{which}.weight")
                factors.setdefault(name, {})[which] = value
    broken = [n for n, f in factors.items() if len(f) != 2]
    if broken or not factors:
        raise StoreError(f"{folder / ADAPTER_FILES[1]} lacks LoRA matrices ({broken or 'all'}).")
    return config, {n: (f["lora_B"], f["lora_A"]) for n, f in factors.items()}
