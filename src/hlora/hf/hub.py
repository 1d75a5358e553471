"""Adapters and importance on the Hugging Face hub: read by name, and uploaded.

Tokens are the hub library's own business (`hf auth login`, or HF_TOKEN): none is read here to be
written anywhere.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any

from hlora.core.card import CARD
from hlora.core.info import MARKER, TENSORS
from hlora.errors import HubError, InputError, one_line
from hlora.files import ADAPTER_FILES, MARKERS

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = (*ADAPTER_FILES, *MARKERS, TENSORS, CARD)
"""All that is uploaded of a folder, or downloaded: whatever else lies there stays there."""
_PLACE = re.compile(r"(?:^|(?<==))(?:/|~|[A-Za-z]:[\\/])\S?.*")


def located(where: str | Path) -> Path:
    """The folder of an adapter or importance: itself, or a download of `owner/name[@revision]`.

    Raises:
        InputError: it is neither here nor on the hub.
    """
    return _resolved(str(where))[0]


def pinned(where: str) -> str:
    """`owner/name@COMMIT` of what `located` found on the hub; a folder stays as it is.

    Raises:
        InputError: as `located`.
    """
    return _resolved(where)[1]


@lru_cache  # one command reads one revision, whatever is pushed meanwhile
def _resolved(where: str) -> tuple[Path, str]:
    name, _, revision = where.partition("@")
    if Path(where).exists() or not NAME.fullmatch(name):
        return Path(where), where
    from huggingface_hub import snapshot_download

    try:
        # Checked as any folder is; of a revision, which is then noted.
        folder = Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(FILES))
        )
    except Exception as error:  # the hub's library may raise anything
        raise InputError(
            f"{where} is no folder here and cannot be had from the hub: {_said(error)}"
        ) from None
    return folder, f"{name}@{folder.name}"


def check_name(name: str | None) -> None:
    """Refuse, before any work, a repository that cannot be pushed to.

    Raises:
        InputError: it is not OWNER/NAME, or nobody is logged in.
    """
    if name is None:
        return
    if not NAME.fullmatch(name):
        raise InputError(f"--push-to-hub must be OWNER/NAME, not {name!r}.")
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError("--push-to-hub needs a login: `hf auth login`, or a token in HF_TOKEN.")


def push(
    folder: Path, name: str, *, more: Path | None = None, public: bool = False, advice: str = ""
) -> str:
    """Upload a finished adapter or importance; returns its address.

    A new repository is private unless `public`; one that is there keeps what it is. Places on this
    disk are cut to their last part in what is uploaded.

    Args:
        more: an importance of the same adapter, which joins it: the name is then both.
        advice: how to try again.

    Raises:
        HubError: it could not be uploaded; the folder is as it was.
        KeyboardInterrupt: says so too.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    places = [p for p in (more, folder) if p is not None]
    found = {f: p / f for p in places for f in FILES if (p / f).is_file()}
    try:
        api = HfApi()
        address = api.create_repo(name, private=not public, exist_ok=True)
        parts = [CommitOperationAdd(f, _content(path)) for f, path in found.items()]
        message = f"{'Importance' if MARKER in found else 'Adapter'} by hlora"
        api.create_commit(name, parts, commit_message=message)
    except KeyboardInterrupt:
        said = f"Stopped while uploading to {name}. The result is whole, in {folder}."
        raise KeyboardInterrupt(said + advice) from None
    except Exception as error:  # the hub's library may raise anything
        raise HubError(
            f"The result is in {folder}, and could not be uploaded to {name}: {_said(error)}."
            + advice
        ) from None
    return str(address)


def _content(path: Path) -> str | bytes:
    """What is uploaded of a file: itself, or its JSON without places."""
    if path.suffix != ".json":
        return str(path)
    cleaned = without_places(json.loads(path.read_text("utf-8")))
    text = json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def without_places(value: Any) -> Any:
    """The value, with each path from a root or a home cut to its last part."""
    if isinstance(value, dict):
        return {k: without_places(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_places(v) for v in value]
    if isinstance(value, str) and "\n" not in value:
        return _PLACE.sub(lambda m: PureWindowsPath(m[0]).name, value)
    return value


def _said(error: Exception) -> str:
    """The error without a token, should it ever hold one."""
    from huggingface_hub import get_token

    text = one_line(error, 300).rstrip(".")
    token = get_token()
    return text.replace(token, "…") if token else text
