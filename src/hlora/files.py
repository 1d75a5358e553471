"""Files that appear whole or not at all, and folders that hold a finished result or none."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hlora.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MARKERS = ("importance.json", "tune.json", "rewind.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
RESULTS = (*MARKERS, ADAPTER_FILES[0])
"""A folder with one of these files holds a result: of a phase, or another adapter."""


def write_whole(path: Path, content: bytes | str) -> None:
    """Write aside, flush to the disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file's name need not be UTF-8; in JSON its escape is the same name.
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(without_nan(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n")


def without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


MANIFEST = "hlora_manifest.json"
"""Size and checksum of every file of a checkpoint, written last."""
READY = ".ready-"
"""With its marker, a result that is whole and on the disk, on its way into the folder around it."""


def seal(folder: Path) -> None:
    """Note the checksums of all files of a folder, once they are on the disk."""
    noted = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        noted[path.name] = checksum(path)
    write_json(folder / MANIFEST, noted)


def fault(folder: Path) -> str | None:
    """What is wrong with a sealed folder; None if it is whole."""
    try:
        noted = json.loads((folder / MANIFEST).read_text("utf-8"))
        for name, of in noted.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if checksum(folder / name) != of:
                return f"{name} is damaged"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def checksum(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


@contextmanager
def publish(folder: Path, marker: str) -> Iterator[Path]:
    """A folder to write a result into; its files move to `folder` together.

    The marker of an earlier result is removed first and `marker` put in place last, so a folder
    that has one is whole.
    Until then nothing of an earlier result is touched. From the renaming to READY on, the next
    start finishes what a kill leaves.
    """
    recover(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder, prefix=".incoming-", ignore_cleanup_errors=True
    ) as name:
        aside = Path(name)
        yield aside
        files = sorted(p for p in aside.iterdir() if p.name != marker)
        for path in [*files, aside / marker]:
            if path.is_dir():  # of a tokenizer with several templates
                continue
            os.chmod(path, 0o666 & ~_umask())  # safetensors keeps them to their owner
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(aside, folder / (READY + marker))
        recover(folder)
    unlock(folder)


def recover(folder: Path) -> None:
    """Finish the publishing that a kill cut short, and drop a result that was never whole."""
    for ready in folder.glob(READY + "*"):
        marker = ready / ready.name.removeprefix(READY)
        if marker.exists():  # else it has moved, as the last one
            for old in MARKERS:
                (folder / old).unlink(missing_ok=True)
            files = sorted(p for p in ready.iterdir() if p != marker)
            for path in [*files, marker]:
                os.replace(path, folder / path.name)
        ready.rmdir()
    for aside in folder.glob(".incoming-*"):
        shutil.rmtree(aside, ignore_errors=True)


_LOCKS: dict[tuple[int, int], int] = {}


def lock(folder: Path) -> None:
    """Keep other processes from writing to a folder or file, until `unlock` or the end of this one.

    Raises:
        InputError: another process does.
    """
    if fcntl is None or os.environ.get("RANK", "0") != "0":
        return
    unlock(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise InputError(
                f"Another process is writing to {folder}: wait for it, or choose another place."
            ) from None
        return  # a file system without locks
    _LOCKS[_identity(folder)] = handle


def unlock(folder: Path) -> None:
    handle = _LOCKS.pop(_identity(folder), None) if folder.exists() else None
    if handle is not None:
        os.close(handle)


def _identity(folder: Path) -> tuple[int, int]:
    """Of the folder itself, which may be moved."""
    found = folder.stat()
    return found.st_dev, found.st_ino


def refuse_file(path: Path, overwrite: bool) -> None:
    """Raise InputError if a file cannot be written, or is there already."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file.")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already: choose another, or --overwrite it.")
    _refuse_unwritable(path.parent, path)


def refuse_result(folder: Path, overwrite: bool) -> None:
    """Lock an output folder and clean it of what a kill left.

    Raises:
        InputError: it cannot be written, is in use, or already holds a finished result.
    """
    refuse_no_folder(folder)
    if folder.exists():
        lock(folder)
        recover(folder)
    if not overwrite:
        refuse_held(folder)
    _refuse_unwritable(folder, folder)
    lock(folder)


_MADE: set[Path] = set()
"""Folders that this process made, and may take away again."""


def take_away(folder: Path) -> None:
    """Remove a folder that this process made, if there is no file in it."""
    folder = Path(os.path.abspath(folder))
    if folder not in _MADE or any(p.is_file() for p in folder.rglob("*")):
        return
    inside = (Path(path) for path, _, _ in os.walk(folder, topdown=False))
    around = (p for p in folder.parents if p in _MADE)
    with suppress(OSError):  # something was written meanwhile, or beside it
        for path in (*inside, *around):
            path.rmdir()
            _MADE.discard(path)


def _make(folder: Path) -> None:
    folder = Path(os.path.abspath(folder))
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    _MADE.update(missing)


def _refuse_unwritable(folder: Path, named: Path) -> None:
    try:
        _make(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{named} cannot be written ({error.strerror}).") from None


def refuse_no_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"The output {folder} is a file: name a folder.")


def refuse_held(folder: Path) -> None:
    """Raise InputError if a folder holds a finished result."""
    if held := [m for m in RESULTS if (folder / m).exists()]:
        raise InputError(
            f"{folder} already holds a result ({held[0]}): choose another folder, or overwrite it "
            "with --overwrite (overwrite=True)."
        )


def check_space(folder: Path, needed: int) -> None:
    """Raise InputError if the disk of `folder` has less than `needed` bytes free."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"The disk of {folder} has {size(free)} free and this needs about {size(needed)}: "
            "free some, or choose another --output."
        )


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, whatever library raised it, says that there is no room on the disk.

    Or none for so large a file: a quota, or a limit (`ulimit -f`).
    """
    said = (
        "No space left", "os error 28", "File too large", "os error 27", "file write failed",
        "iostream error",
    )  # fmt: skip
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(words in str(seen) for words in said):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def size(count: float) -> str:
    """Bytes for people: 1.3 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
