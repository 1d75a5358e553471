"""An adapter on disk, in PEFT's published format: B and A by the name of their matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hlora.errors import StoreError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """The adapter in a folder: its config and (B, A) by the pair's name.

    Raises:
        StoreError: a file is missing or damaged.
    """
    for file in ADAPTER_FILES:
        if not (folder / file).is_file():
            raise StoreError(f"{folder} holds no LoRA adapter: {file} is missing.")
    try:
        config = json.loads((folder / ADAPTER_FILES[0]).read_text("utf-8"))
        tensors = load_file(folder / ADAPTER_FILES[1])
    except (ValueError, SafetensorError, OSError) as error:
        raise StoreError(f"The adapter in {folder} cannot be read ({error}).") from None
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
