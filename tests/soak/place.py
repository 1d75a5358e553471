"""A folder with a tiny model, text, a task and a study, and the commands that are tried on them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hlora.core import store
from tests.tiny import questions, write_model, write_rows, write_text

TRAINING = ["--max-steps", "5", "--save-steps", "2", "--batch-size", "2"]
TRAINING += ["--training.save_total_limit", "3"]
MODEL = ["--model", "model", "--device", "cpu", "--dtype", "fp32"]
STUDY = """
model: model
general: {a: a.txt}
held_out: {a: a.txt, b: b.txt}
tasks: {parity: {train: t.jsonl, test: t.jsonl}}
methods: [hlora-factored]
seeds: [0]
record: {max_steps: 2, save_steps: 1, batch_size: 2, block_size: 32}
tune: {max_steps: 2, save_steps: 1, batch_size: 2}
eval: {block_size: 32, text_blocks: 2, task_rows: 2}
work: NAME-work
"""


@dataclass(frozen=True)
class Command:
    """A command that makes something of its own name.

    Attributes:
        name: `record`, `tune`, `domain` (a `tune` that also records) or `study`.
    """

    name: str

    def argv(self, output: str) -> list[str]:
        if self.name == "study":
            Path(f"{output}.yaml").write_text(STUDY.replace("NAME", output), "utf-8")
            return ["study", f"{output}.yaml", "--results", f"{output}.jsonl"]
        given = [*MODEL, *TRAINING, "--output", output]
        if self.name == "record":
            text = ["--kind", "factored", "--text", "a.txt", "--block-size", "32"]
            return ["record", *given, *text]
        more = ["--record", recorded(output)] if self.name == "domain" else []
        return ["tune", *given, "--task", "t.jsonl", "--importance", "record", *more]

    def again(self, output: str) -> list[str]:
        return [*self.argv(output), *([] if self.name == "study" else ["--resume"])]

    def found(self, output: str) -> Any:
        """What it made, to be compared; None if that is nothing whole."""
        try:
            if self.name == "study":
                return list(_lines(output))
            places = [output, recorded(output)] if self.name == "domain" else [output]
            return [made for place in places for made in _tensors(Path(place))]
        except (OSError, SafetensorError, ValueError, KeyError):
            return None

    def left(self, output: str) -> list[str]:
        """What should not be there when it is done."""
        folders = [Path(f"{output}-work")] if self.name == "study" else [Path(output)]
        folders.append(Path(recorded(output)))
        return [
            str(p) for folder in folders for p in folder.rglob("*")
            if p.name.startswith((".incoming-", ".ready-", "checkpoint")) or p.suffix == ".tmp"
        ]  # fmt: skip


COMMANDS = [Command(name) for name in ("record", "tune", "domain", "study")]


def recorded(output: str) -> str:
    """The folder of the importance that a `domain` records."""
    return f"{output}-recorded"


def _tensors(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    files = ["adapter_model.safetensors"]
    files += [store.TENSORS] if (folder / store.MARKER).exists() else []
    if not any((folder / m).exists() for m in (store.MARKER, "tune.json")):
        raise ValueError
    for file in files:
        for key, value in sorted(load_file(folder / file).items()):
            yield file, key, value.contiguous().view(torch.uint8).numpy().tobytes()


def _lines(output: str) -> Iterator[str]:
    lines = map(json.loads, Path(f"{output}.jsonl").read_text("utf-8").splitlines())
    for result in {r["key"]: r for r in lines}.values():  # a run that failed was made again
        kept = {k: result[k] for k in ("run", "error", "text", "task", "forgetting", "log")}
        yield json.dumps(kept, sort_keys=True)


def build(folder: Path) -> None:
    """Make the folder's files and go into it."""
    os.chdir(folder)
    write_model(Path("model"))
    write_text(Path("a.txt"))
    write_text(Path("b.txt"), "one two three four five")
    write_rows(Path("t.jsonl"), questions())
