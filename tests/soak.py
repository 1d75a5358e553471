"""Kills, damage and what comes of them. `make soak`

    python -m tests.soak [--kills 120] [--mutations 5000] [--page docs/reliability.md]

Each phase on a tiny model is killed before one of its file operations and then resumed: the result
must be that of a run that nobody killed, to the bit. Every file that is read is damaged in many
ways, signed again where a checksum would stop it: it must be refused in one sentence or be read.
The command fails on a traceback, on a difference, and on a value that is not finite.
"""

from __future__ import annotations

import argparse
import builtins
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hlora.cli import main as cli
from hlora.core import statefile, store
from hlora.core.adapter_file import read_adapter
from hlora.data.source import Source
from hlora.data.tasks import load_task
from hlora.errors import HloraError, StoreError
from hlora.files import MANIFEST, checksum, seal, write_json, write_whole
from hlora.hf.checkpoints import newest_whole
from hlora.study.lines import read_lines
from hlora.study.spec import read_study
from tests.tiny import questions, write_model, write_rows, write_text

OPERATIONS = ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync")
KILLED = 87


def run(argv: list[str], log: Path, kill_at: int | None = None) -> tuple[int, int]:
    """A command in a process of its own, killed before its n-th file operation.

    Returns:
        Its exit status, and how many operations there were.
    """
    told, tell = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        with os.fdopen(told) as pipe:
            count = pipe.read()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(count or 0)
    done = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def before(*args: Any, **named: Any) -> Any:
            nonlocal done
            writes = function is not builtins_open or set("wxa+") & set(str(args[1:2]))
            if writes and done == kill_at:
                os._exit(KILLED)
            done += bool(writes)
            return function(*args, **named)

        return before

    builtins_open = builtins.open
    status = 70
    try:
        with builtins_open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        for name in OPERATIONS:
            setattr(os, name, counted(getattr(os, name)))
        builtins.open = counted(builtins_open)
        status = cli.main(argv)
    except BaseException:
        traceback.print_exc()
    os.write(tell, str(done).encode())
    os._exit(status)


def kills(place: Path, most: int) -> Counter:
    """Both phases, killed at many points each."""
    model = write_model(place / "model")
    text, task = write_text(place / "a.txt"), write_rows(place / "t.jsonl", questions())
    common = ["--model", str(model), "--device", "cpu", "--max-steps", "6", "--save-steps", "2"]
    common += ["--batch-size", "2"]
    phases = {
        "record": [*common, "--kind", "factored", "--text", str(text), "--block-size", "32"],
        "tune": [*common, "--task", str(task), "--importance", str(place / "record")],
    }
    found: Counter = Counter()
    for name, given in phases.items():
        argv, log = [name, *given, "--output"], place / f"{name}.log"
        status, operations = run([*argv, str(place / name)], log)
        if status:
            raise SystemExit(f"{name} failed: {log.read_text()[-2000:]}")
        points = min(operations, most // len(phases))
        for i in range(points):
            at, output = i * operations // points, place / "killed"
            shutil.rmtree(output, ignore_errors=True)
            killed, _ = run([*argv, str(output)], log, kill_at=at)
            found[f"{name}: killed"] += killed == KILLED
            status, _ = run([*argv, str(output), "--resume"], log)
            left = [p.name for p in output.iterdir() if p.name.startswith(".")]
            same = not status and alike(place / name, output)
            outcome = "resumed to the same bits" if same else "DIFFERENT"
            found[f"{name}: {outcome}"] += 1
            found[f"{name}: LEFTOVERS"] += bool(left) or (output / "checkpoints").exists()
            if outcome == "DIFFERENT":
                print(f"{name}, before operation {at}: {status}\n{log.read_text()[-1500:]}")
    return found


def alike(one: Path, other: Path) -> bool:
    """Whether two results hold the same weights and importance."""
    files = [f for f in ("adapter_model.safetensors", store.TENSORS) if (one / f).exists()]
    try:
        pairs = [(load_file(one / f), load_file(other / f)) for f in files]
    except OSError:
        return False
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


def damaged(draw: random.Random, good: bytes) -> bytes:
    """Cut, flipped, repeated, or with a value of another type."""
    kind = draw.randrange(6)
    at = draw.randrange(len(good))
    if kind == 0:
        return good[:at]
    if kind == 1:
        return good[:at] + bytes([draw.randrange(256)]) + good[at + 1 :]
    if kind == 2:
        return good[:at] + good[at // 2 :]
    if kind == 3:
        return (
            good[:at] + draw.choice([b"\0", b"NaN", b"[[[[", b"\xff\xfe", b"}", b"-1"]) + good[at:]
        )
    try:
        content = json.loads(good)
        inner = content
        while isinstance(inner, dict) and inner and draw.random() < 0.6:
            key = draw.choice(list(inner))
            if not isinstance(inner[key], dict) or not inner[key]:
                break
            inner = inner[key]
        key = draw.choice(list(inner))
        inner[key] = draw.choice([None, [], {}, -1, 10**30, "x", [[]], True, 0.5, "", "\x1b[31m"])
        return json.dumps(content).encode()
    except (ValueError, TypeError, IndexError, AttributeError):
        return good[at:]


def mutations(place: Path, count: int) -> Counter:
    """Every file that is read, damaged."""
    nu, mu = place / "record", place / "tune"
    lines = place / "r.jsonl"
    root = Path(__file__).parents[1]
    write_whole(
        lines, (root / "results" / "smollm2.jsonl").read_text("utf-8").split("\n")[0] + "\n"
    )
    shutil.copy(root / "studies" / "tiny.yaml", place / "s.yaml")
    state = place / "state.safetensors"
    state.write_bytes(statefile.pack({"a": torch.ones(2)}, {"phi": 1.0}))
    work = place / "work"
    shutil.copytree(mu, work / "checkpoint-2")
    seal(work / "checkpoint-2")

    def resumed() -> None:
        if newest_whole(work) is None:
            raise StoreError("no whole checkpoint")

    readers: dict[Path, Callable[[], Any]] = {
        nu / store.MARKER: lambda: store.load(nu),
        nu / store.TENSORS: lambda: store.load(nu),
        nu / "adapter_model.safetensors": lambda: store.load(nu),
        nu / "adapter_config.json": lambda: store.load(nu),
        mu / "adapter_model.safetensors": lambda: read_adapter(mu),
        mu / "adapter_config.json": lambda: read_adapter(mu),
        lines: lambda: read_lines(lines),
        place / "s.yaml": lambda: read_study(place / "s.yaml"),
        place / "t.jsonl": lambda: load_task(str(place / "t.jsonl")),
        place / "a.txt": lambda: list(Source.parse(str(place / "a.txt")).documents()),
        state: lambda: statefile.read(state, "penalty"),
        work / "checkpoint-2" / "tune.json": resumed,
        work / "checkpoint-2" / MANIFEST: resumed,
    }  # fmt: skip
    found: Counter = Counter()
    draw = random.Random(0)
    for path, read in readers.items():
        good, marker = path.read_bytes(), (nu / store.MARKER).read_bytes()
        for _ in range(count // len(readers)):
            path.write_bytes(damaged(draw, good))
            if path.parent == nu and path.name != store.MARKER:  # a forger signs again
                info = json.loads(marker)
                info["files"][path.name] = checksum(path)
                write_json(nu / store.MARKER, info)
            try:
                result = read()
                finite = not isinstance(result, store.Stored) or all(
                    f.isfinite().all() for both in result.factors.values() for f in both
                )
                found[f"{path.name}: {'read' if finite else 'NOT FINITE'}"] += 1
            except HloraError:
                found[f"{path.name}: refused"] += 1
            except Exception:
                found[f"{path.name}: TRACEBACK"] += 1
                print(f"{path}\n{traceback.format_exc()[-1200:]}")
            (nu / store.MARKER).write_bytes(marker)
            path.write_bytes(good)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--mutations", type=int, default=5000)
    parser.add_argument("--page", type=Path, help="write the counts as a Markdown page")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        found = kills(Path(name), given.kills) + mutations(Path(name), given.mutations)
    table = ["| | |", "|---|---:|", *(f"| {what} | {n} |" for what, n in found.items())]
    print("\n".join(table))
    bad = {what: n for what, n in found.items() if what.rpartition(": ")[2].isupper()}
    if given.page:
        head = (
            "# What was tried to break it\n\nWritten by `make soak`: both phases on a tiny model "
            "killed before a file operation and\nresumed, and every file that is read damaged, "
            "signed again where a checksum would stop it.\n\n"
        )
        write_whole(given.page, head + "\n".join(table) + "\n")
    if bad:
        sys.exit(f"Not as it must be: {bad}")


if __name__ == "__main__":
    main()
