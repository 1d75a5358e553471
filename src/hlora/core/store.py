"""An importance folder: the ν adapter in PEFT's format, `importance.safetensors` and
`importance.json`, checked against the model that they belong to.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hlora import __version__
from hlora.core import card
from hlora.core.adapter_file import ADAPTER_FILES, read_adapter, read_config
from hlora.core.importance import Importance
from hlora.core.info import FORMAT
from hlora.core.info import MARKER as MARKER
from hlora.core.info import TENSORS as TENSORS
from hlora.core.info import read_info as read_info
from hlora.core.kinds import KINDS, kind_named
from hlora.core.pairs import Pair, check_same, describe
from hlora.core.recorder import describe_summary
from hlora.errors import DivergedError, HloraError, MismatchError, StoreError, one_line
from hlora.files import checksum, publish, sha256, write_json

logger = logging.getLogger(__name__)

VOCABULARY = "vocabulary size"
"""What may change of a base model: rows are added for new tokens."""


OF_MERGED = " If adapters were merged into them since, give anchor='merged' (--anchor merged)."
"""What else to do about other weights than those that an importance was recorded on."""


@dataclass
class Stored:
    """What an importance folder holds: `importance.json`, Ω, and θ^ν as (B, A) by pair name."""

    folder: Path
    info: dict[str, Any]
    importance: Importance
    factors: dict[str, tuple[Tensor, Tensor]]

    def check(
        self, base: dict[str, Any], pairs: list[Pair], *, ranks: bool = True, merged: bool = False
    ) -> None:
        """Refuse a model that this importance does not belong to.

        Args:
            base: what identifies the model, from `hlora.hf.peft.base_of`.
            ranks: also refuse smaller ranks than the recorded adapter's.
            merged: the weights may be others, since adapters were merged into them.

        Raises:
            MismatchError: names both values.
        """
        if merged:  # only that it is of the same architecture
            config = {k: v for k, v in base["config"].items() if k != VOCABULARY}
            base = {**base, "config": config, "samples": {}}
        where, noted = str(self.folder), self.info["pairs"]
        alike = {n for p in pairs for n in p.names} == noted.keys()
        if alike:  # shapes that differ say more than the weights in them
            check_same(pairs, noted, where, ranks=ranks)
        check_base(base, self.info["base_model"], where, advice=OF_MERGED)
        if not alike:
            check_same(pairs, noted, where, ranks=ranks)


def about(base: dict[str, Any], pairs: list[Pair]) -> dict[str, Any]:
    """What `importance.json` says of the model and of the time."""
    return {
        "format": FORMAT,
        "hlora_version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "base_model": base,
        "pairs": describe(pairs),
        "versions": card.versions(),
    }


def write(aside: Path, importance: Importance, info: dict[str, Any]) -> dict[str, Any]:
    """Write the importance and its `importance.json` beside an adapter; returns the latter.

    Raises:
        DivergedError: the importance is not finite.
        StoreError: what was noted of another one, from which this is made, is damaged.
    """
    try:
        importance.check()
    except ValueError as error:
        raise DivergedError(
            f"The importance is not written: {error}. Likely cause: the learning rate; try a tenth."
        ) from None
    tensors = {n: t.detach().cpu().contiguous() for n, t in importance.tensors().items()}
    save_file(tensors, aside / TENSORS, metadata={"format": "pt"})
    info = {
        **info,
        "kind": importance.kind,
        "norms": importance.norms(),
        "adapter_config": read_config(aside),
        "files": {f: checksum(aside / f) for f in (*ADAPTER_FILES, TENSORS)},
    }
    write_json(aside / MARKER, info)
    try:
        text = card.recorded(info)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # of what was read
        raise StoreError(
            f"What {MARKER} says of its recording is damaged ({one_line(error)}): record again."
        ) from None
    card.write_card(aside, text)
    return info


def derive(stored: Stored, output: Path, importance: Importance, storage: str) -> None:
    """Another importance for the same adapter, in a folder of its own."""
    info = {
        **stored.info,
        "gathered_as": stored.info.get("gathered_as", stored.info["kind"]),
        "recording": {**stored.info["recording"], "storage": storage},
    }
    with publish(output, MARKER) as aside:
        for file in ADAPTER_FILES:
            shutil.copyfile(stored.folder / file, aside / file)
        write(aside, importance, info)


def load(folder: Path | str) -> Stored:
    """Read an importance folder and check that it is whole.

    Raises:
        InputError, StoreError: one sentence on what is missing, damaged or changed.
    """
    folder = Path(folder)
    info = read_info(folder)
    for file, noted in info["files"].items():
        path = folder / file
        if not path.is_file():
            raise StoreError(f"{path} is missing: record again.")
        if file == ADAPTER_FILES[0] and (edited := _edited(folder, info)) is not None:
            if edited:
                raise StoreError(
                    f"{path} was edited after the recording: it has another {edited[0]}. Put the "
                    "old value back, or record again with the new one."
                )
            continue
        if path.stat().st_size != noted["bytes"]:
            raise StoreError(
                f"{path} has {path.stat().st_size} bytes and was written with {noted['bytes']}: it "
                "is truncated or was replaced. Record again."
            )
        if sha256(path) != noted["sha256"]:
            raise StoreError(f"{path} was changed after it was recorded: record again.")
    if info["kind"] not in KINDS:
        raise StoreError(
            f"{folder} holds importance of the kind {info['kind']!r}; this hlora knows "
            f"{', '.join(KINDS)}: upgrade hlora."
        )
    try:
        importance = kind_named(info["kind"]).from_tensors(load_file(folder / TENSORS))
        if importance.names != info["pairs"].keys():
            raise ValueError(f"it and {MARKER} name different layers")
        importance.check()
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise StoreError(f"{folder / TENSORS} is damaged ({error}): record again.") from None
    _, factors = read_adapter(folder)
    return Stored(folder, info, importance, factors)


def described(info: dict[str, Any], folder: Path) -> str:
    """The summary in `importance.json`, for people.

    Raises:
        StoreError: it is damaged.
    """
    try:
        summary = info["summary"]
        float(summary.get("seconds") or 0)
        return describe_summary(info.get("gathered_as", info["kind"]), summary)
    except (KeyError, TypeError, ValueError, AttributeError, HloraError) as error:
        raise StoreError(f"The summary in {folder} is damaged ({error}): record again.") from None


def _edited(folder: Path, info: dict[str, Any]) -> list[str] | None:
    """The adapter's settings that differ from those recorded; None where they were not noted.

    Other line ends and another place of the base model are no difference.
    """
    noted = info.get("adapter_config")
    if not isinstance(noted, dict):
        return None
    here = read_config(folder)
    return sorted(k for k in here.keys() | noted.keys() if here.get(k) != noted.get(k))


def check_base(here: dict[str, Any], noted: dict[str, Any], where: str, advice: str = "") -> None:
    """Refuse another base model. Rounding to another float type is not another model.

    Another size of the vocabulary is none either; where no weights can be compared, it is told.

    Args:
        advice: what else to do about other weights.

    Raises:
        MismatchError: names what differs.
        StoreError: what was noted is damaged.
    """
    try:
        _check_base(here, noted, where, advice)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        said = one_line(error) or type(error).__name__
        raise StoreError(f"What {where} says of its base model is damaged ({said}).") from None


def _check_base(here: dict[str, Any], noted: dict[str, Any], where: str, advice: str) -> None:
    compared = here["samples"].keys() & noted["samples"].keys()
    for what, value in here["config"].items():
        there = noted["config"].get(what, value)
        if value == there:
            continue
        if what == VOCABULARY:
            if not compared:
                logger.warning(
                    "The vocabulary has %s tokens here and %s in %s. The weights are quantized, so "
                    "that it is not known whether it is the same model, resized.",
                    value, there, where,
                )  # fmt: skip
        else:
            raise MismatchError(
                f"The base model differs: its {what} is {value} here and {there} in {where} "
                f"(recorded on {noted['name'] or 'an unnamed model'})."
            )
    for name in compared:
        a, b = torch.tensor(here["samples"][name]), torch.tensor(noted["samples"][name])
        if a.shape != b.shape:
            raise ValueError(f"there are not {len(a)} samples of {name}")
        # bf16 keeps 8 bits: two roundings differ by at most 1/128 of the value.
        differs = (a - b).abs() > 0.008 * torch.maximum(a.abs(), b.abs()) + 1e-6
        if differs.any():
            i = int(differs.float().argmax())
            raise MismatchError(
                f"The base model has other weights than the one that {where} was recorded on: an "
                f"entry of {name} is {a[i]:.6g} here and {b[i]:.6g} there "
                f"({here['name'] or 'unnamed'} and {noted['name'] or 'unnamed'}).{advice}"
            )
