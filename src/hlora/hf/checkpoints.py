"""Where Trainer keeps its checkpoints, beside which the callbacks keep their state."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def checkpoint_folder(args: Any, state: Any) -> Path:
    """The checkpoint of the present step: about to be written, or just resumed from."""
    given = args.resume_from_checkpoint
    if isinstance(given, str) and given.rstrip("/").endswith(f"-{state.global_step}"):
        return Path(given)
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
