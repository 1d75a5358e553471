"""An adapter added to the weights of its base model, written as a model of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hlora.core import card
from hlora.core.finite import broken_weight
from hlora.errors import DivergedError, InputError
from hlora.files import check_space, publish, refuse_result
from hlora.hf.fits import noted_base
from hlora.hf.hub import located, pinned
from hlora.hf.peft import base_of, find_pairs, merge_adapter
from hlora.run import machine
from hlora.run.inputs import check_apart
from hlora.run.models import DTYPES, load_adapter, load_as_published
from hlora.run.outputs import tidied
from hlora.run.settings import MergeSettings

CONFIG = "config.json"
"""The marker of a whole model: it is moved into place last."""
SHARD = "5GB"


@dataclass(frozen=True)
class Merged:
    """The folder of a merged model, and its number of parameters."""

    folder: Path
    parameters: int


@tidied
def merge(settings: MergeSettings) -> Merged:
    """Merge, and write weights, tokenizer and generation settings.

    Raises:
        InputError: an output that is there already; a base model that is quantized, or not named.
        MismatchError: the adapter is another base model's.
        DivergedError: a weight is not finite.
    """
    adapter, output = located(settings.adapter), Path(settings.output)
    refuse_result(output, overwrite=True)
    if any(output.iterdir()):  # shards of two models would be mixed
        raise InputError(f"{output} is not empty: choose another folder for the merged model.")
    noted = noted_base(adapter)
    source = settings.model or _base_named(adapter, noted)
    check_apart(settings.output, model=source)
    model, tokenizer = load_as_published(source, DTYPES.get(settings.dtype))
    if getattr(model.config, "quantization_config", None):
        raise InputError(
            f"{source} is quantized, and an adapter added to rounded weights would be rounded "
            "with them: name the model that it was quantized from with --model."
        )
    with_adapter: Any = load_adapter(model, adapter, trainable=True)
    base = {"name": str(getattr(model.config, "name_or_path", "")), "revision": None}
    if noted:
        base = base_of(with_adapter, find_pairs(with_adapter))
    merged: Any = merge_adapter(with_adapter)
    if name := broken_weight(merged):
        raise DivergedError(f"The base model's {name} is not finite: take another copy.")
    parameters = sum(p.numel() for p in merged.parameters())
    check_space(output, sum(p.nbytes for p in merged.parameters()))
    merged.config.name_or_path = ""  # a place on this disk
    with publish(output, CONFIG) as aside:
        merged.save_pretrained(aside, safe_serialization=True, max_shard_size=SHARD)
        tokenizer.save_pretrained(aside)
        info = {
            "base_model": base,
            "adapter": pinned(settings.adapter),
            "versions": machine.versions(),
        }
        card.write_card(aside, card.merged(info))
    return Merged(output, parameters)


def _base_named(adapter: Path, noted: dict[str, Any] | None) -> str:
    try:
        config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
    except (OSError, ValueError, AttributeError, RecursionError):
        name = revision = None  # `load_adapter` says what is wrong
    if not name:
        raise InputError(f"{adapter} names no base model: give it with --model.")
    revision = revision or (noted or {}).get("revision")
    return f"{name}@{revision}" if revision and not Path(name).exists() else str(name)
