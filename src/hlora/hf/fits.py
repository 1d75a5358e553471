"""Whether an adapter on disk is whole and of this model, said before a weight of it is moved."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from hlora.core.adapter_file import ADAPTER_FILES, read_config
from hlora.core.store import check_base
from hlora.errors import MismatchError, StoreError
from hlora.files import MARKERS
from hlora.hf.peft import active_adapter, base_like, kind_of, moves_base

_ELSEWHERE = "give the model that it was trained on"


def check_fits(model: Any, folder: Path, advice: str = "") -> None:
    """Compare an adapter with the model that it is to be put on; the model stays as it is.

    Args:
        model: without an adapter.
        advice: what else to do about other weights.

    Raises:
        MismatchError: it is another model's, by the names, the sizes or (one of ours) the weights.
        StoreError: by its settings it is another one than its file holds.
    """
    from peft import PeftConfig, get_peft_model

    if not moves_base(read_config(folder)):
        check_same_base(model, folder, advice)
    config = PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # compared here, not by its name
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True  # another start takes longer, and has no other names
    with torch.device("meta"):
        adapted = get_peft_model(type(model)(copy.deepcopy(model.config)), config)
    check_loaded(adapted, folder)


def check_loaded(model: nn.Module, folder: Path) -> None:
    """Refuse an adapter that is not what its settings made of this model: PEFT only warns.

    Raises:
        MismatchError, StoreError: as `check_fits`.
    """
    from peft import get_peft_model_state_dict

    lora = kind_of(active_adapter(model)[1]) == "LORA"
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    made = {k: list(v.shape) for k, v in state.items() if "lora_" in k or not lora}
    with safe_open(folder / ADAPTER_FILES[1], framework="pt") as file:
        names = [k for k in file.keys() if "lora_" in k or not lora]  # noqa: SIM118
        held = {k: file.get_slice(k).get_shape() for k in names}
    modules = _modules(model)
    for key in sorted(held.keys() - made.keys()):
        if not _is_on(key, modules):
            raise MismatchError(
                f"The adapter in {folder} is another model's: it has {_bare(key)}, of which this "
                f"model has nothing. Leave it, or {_ELSEWHERE}."
            )
    by = f"by {ADAPTER_FILES[0]} and this model"
    for key in sorted(held.keys() & made.keys()):
        if held[key] == made[key]:
            continue
        said = f"its {_bare(key)} is {_size(held[key])}, and {by} it would be {_size(made[key])}"
        if _base_size(key, held[key]) != _base_size(key, made[key]):
            raise MismatchError(
                f"The adapter in {folder} is another model's: {said}. Leave it, or {_ELSEWHERE}."
            )
        raise StoreError(f"The adapter in {folder} is not whole: {said}.")
    if apart := sorted(made.keys() ^ held.keys()):
        which = "lacks" if apart[0] in made else "has"
        raise StoreError(
            f"The adapter in {folder} is not whole, or is another model's: {by} it is another one "
            f"than {ADAPTER_FILES[1]} holds, which {which} {_bare(apart[0])}."
        )


def check_same_base(model: nn.Module, folder: Path, advice: str = "") -> None:
    """Refuse an adapter of ours that was trained on other weights; that of others says nothing.

    Raises:
        MismatchError: names what differs.
        StoreError: what was noted is damaged.
    """
    if noted := noted_base(folder):
        check_base(base_like(model, noted), noted, str(folder), advice)


def noted_base(folder: Path) -> dict[str, Any] | None:
    """What an adapter of ours says of its base model."""
    for marker in MARKERS:
        try:
            found = json.loads((folder / marker).read_text("utf-8"))["base_model"]
            if {"name", "config", "samples"} <= found.keys():
                return dict(found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return None


def _bare(key: str) -> str:
    return key.removeprefix("base_model.model.")


def _modules(model: nn.Module) -> set[str]:
    """All modules with parameters, by the names that they have without PEFT."""
    names = (n for n, _ in model.named_parameters(remove_duplicate=False))
    return {_bare(n).replace(".base_layer", "").rpartition(".")[0] for n in names}


def _is_on(key: str, modules: set[str]) -> bool:
    parts = _bare(key).replace(".base_layer", "").split(".")
    return any(".".join(parts[:i]) in modules for i in range(1, len(parts)))


def _size(shape: list[int]) -> str:
    return " × ".join(map(str, shape))


def _base_size(key: str, shape: list[int]) -> list[int]:
    """What is left of a matrix's size without the rank."""
    return shape[:1] if ".lora_B" in key else shape[1:]
