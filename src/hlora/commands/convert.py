"""`hlora convert`: an importance folder in a smaller form."""

from __future__ import annotations

import shutil
from pathlib import Path

from hlora import store
from hlora.config import ConvertSettings
from hlora.errors import InputError
from hlora.files import publish, refuse_result, size
from hlora.importance import Dense, Factored, Importance
from hlora.pairs import ADAPTER_FILES


def run(settings: ConvertSettings) -> None:
    """Write the converted importance beside a copy of the adapter."""
    folder, output = Path(settings.folder), Path(settings.output)
    if folder.resolve() == output.resolve():
        raise InputError("--output is the folder itself: choose another.")
    stored = store.load(folder)
    refuse_result(output, settings.overwrite)
    importance = _converted(stored.importance, settings.to)
    info = {**stored.info, "recording": {**stored.info["recording"], "storage": settings.to}}
    with publish(output, store.MARKER) as aside:
        for file in ADAPTER_FILES:
            shutil.copyfile(folder / file, aside / file)
        store.write(aside, importance, info)
    before, after = (store.read_info(f)["files"][store.TENSORS]["bytes"] for f in (folder, output))
    print(f"{size(before)} became {size(after)} in {output}.")


def _converted(importance: Importance, to: str) -> Importance:
    if isinstance(importance, Dense):
        if to == "factored":
            return Factored.of_dense(importance.decoded())
        return importance.stored_as(to)
    if to != "factored":
        raise InputError(
            "Factored importance holds sums only, so no dense one can be made from it: record "
            "with --kind dense."
        )
    return importance
