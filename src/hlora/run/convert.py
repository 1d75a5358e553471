"""An importance folder in another form."""

from __future__ import annotations

from pathlib import Path

from hlora.core import store
from hlora.core.importance.factored import Factored
from hlora.errors import InputError
from hlora.files import refuse_result
from hlora.run.outputs import tidied
from hlora.run.settings import ConvertSettings


@tidied
def convert(settings: ConvertSettings) -> tuple[int, int]:
    """Write the converted importance beside a copy of the adapter.

    Returns:
        Its size in bytes, before and after.

    Raises:
        InputError: the kind of importance cannot take this form.
    """
    folder, output = Path(settings.folder), Path(settings.output)
    if folder.resolve() == output.resolve():
        raise InputError("--output is the folder to be converted: choose another.")
    stored = store.load(folder)
    refuse_result(output, settings.overwrite)
    if settings.to == "ones":  # the same for every kind
        pairs = stored.info["pairs"]
        shapes = {n: (int(p["m"]), int(p["n"])) for n, p in pairs.items()}
        store.derive(stored, output, Factored.ones(shapes), settings.to)
    else:
        store.derive(stored, output, stored.importance.converted(settings.to), settings.to)
    before, after = (store.read_info(f)["files"][store.TENSORS]["bytes"] for f in (folder, output))
    return before, after
