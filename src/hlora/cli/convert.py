"""`hlora convert`: an importance folder in a smaller form."""

from __future__ import annotations

from pathlib import Path

from hlora.core import store
from hlora.core.importance import Importance
from hlora.core.importance.factored import Factored
from hlora.errors import InputError
from hlora.files import refuse_result, size
from hlora.run.settings import ConvertSettings


def run(settings: ConvertSettings) -> None:
    """Write the converted importance beside a copy of the adapter."""
    folder, output = Path(settings.folder), Path(settings.output)
    if folder.resolve() == output.resolve():
        raise InputError("--output is the folder itself: choose another.")
    stored = store.load(folder)
    refuse_result(output, settings.overwrite)
    store.derive(stored, output, _converted(stored, settings.to), settings.to)
    before, after = (store.read_info(f)["files"][store.TENSORS]["bytes"] for f in (folder, output))
    print(f"{size(before)} became {size(after)} in {output}.")


def _converted(stored: store.Stored, to: str) -> Importance:
    importance = stored.importance
    if to == "ones":
        pairs = stored.info["pairs"]
        return Factored.ones({n: (int(p["m"]), int(p["n"])) for n, p in pairs.items()})
    return importance.converted(to)
