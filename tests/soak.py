"""Kills, damage and what comes of them. `make soak`

    python -m tests.soak [--kills 120] [--random 200] [--full 50] [--mutations 5000] [--page PAGE]

Each phase on a tiny model is killed before its file operations, and at random times, and then
resumed: the result must be that of a run that nobody killed, to the bit. So is a small study. Files
may not grow beyond a size, as on a full disk: the run must end with one sentence and go on when
there is room. Every file that is read is damaged in many ways, signed again where a checksum would
stop it: it must be refused in one sentence or be read. Task files, templates and models that want
to run code may not. The command fails on a traceback, on a difference, on a value that is not
finite, and on code that ran.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import json
import logging
import math
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
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
from hlora.run.models import load
from hlora.run.taskfile import read_task_file
from hlora.study.lines import read_lines
from hlora.study.spec import read_study
from tests.tiny import questions, write_model, write_rows, write_text

OPERATIONS = ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync")
KILLED = 87


def run(
    argv: list[str], kill_at: int | None = None, seconds: float | None = None,
    room: int | None = None,
) -> tuple[int, int, str]:  # fmt: skip
    """A command in a process of its own.

    Args:
        kill_at: kill it before so many file operations.
        seconds: kill it and all that it started after so long.
        room: bytes that no file may grow beyond.

    Returns:
        Its exit status, how many operations there were, and what it said.
    """
    (told, tell), (heard, say) = os.pipe(), os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        os.close(say)
        said, until = [], math.inf if seconds is None else time.monotonic() + seconds
        while True:
            left = None if math.isinf(until) else max(0.0, until - time.monotonic())
            if not select.select([heard], [], [], left)[0]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
                until = math.inf
            elif part := os.read(heard, 1 << 16):
                said.append(part)
            else:
                break
        os.close(heard)
        with os.fdopen(told) as pipe:
            count = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, int(count or 0), b"".join(said).decode(errors="replace")
    os.setsid()
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
        os.dup2(say, 1)
        os.dup2(say, 2)
        os.close(say)
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        for name in OPERATIONS:
            setattr(os, name, counted(getattr(os, name)))
        builtins.open = counted(builtins_open)
        status = cli.main(argv)
    except BaseException:
        traceback.print_exc()
    os.write(tell, str(done).encode())
    os._exit(status)


def phases(place: Path) -> dict[str, list[str]]:
    """A recording, a tuning and a study, each short."""
    model = write_model(place / "model")
    text, task = write_text(place / "a.txt"), write_rows(place / "t.jsonl", questions())
    common = ["--model", str(model), "--device", "cpu", "--max-steps", "6", "--save-steps", "2"]
    common += ["--batch-size", "2"]
    return {
        "record": [*common, "--kind", "factored", "--text", str(text), "--block-size", "32"],
        "tune": [*common, "--task", str(task), "--importance", str(place / "record")],
    }


def kills(place: Path, most: int, at_random: int, sizes: int) -> Counter:
    """Both phases, killed at many points each, and short of room."""
    found: Counter = Counter()
    draw = random.Random(0)
    for name, given in phases(place).items():
        argv, began = [name, *given, "--output"], time.monotonic()
        status, operations, said = run([*argv, str(place / name)])
        if status:
            raise SystemExit(f"{name} failed: {said[-2000:]}")
        took = time.monotonic() - began
        largest = max(p.stat().st_size for p in (place / name).rglob("*"))
        points = min(operations, most // 2)
        tries: list[tuple[str, dict[str, Any]]] = [
            *(("killed", {"kill_at": i * operations // points}) for i in range(points)),
        ]
        for _ in range(at_random // 2):
            tries.append(("killed at random", {"seconds": draw.uniform(0, took)}))
        for _ in range(sizes // 2):
            tries.append(("disk full", {"room": int(draw.uniform(0, 1.2) * largest)}))
        for how, limits in tries:
            output = place / "killed"
            shutil.rmtree(output, ignore_errors=True)
            first, _, said = run([*argv, str(output)], **limits)
            found[f"{name}: {how}"] += first != 0
            if "Traceback" in said:
                found[f"{name}: TRACEBACK"] += 1
                print(f"{name}, {how}, {limits}: {first}\n{said[-1500:]}")
            status, _, said = run([*argv, str(output), "--resume"])
            left = [p for p in output.iterdir() if p.name.startswith(".")] if not status else []
            same = not status and alike(place / name, output)
            found[f"{name}: {'resumed to the same bits' if same else 'DIFFERENT'}"] += 1
            if left or (output / "checkpoints").exists():
                found[f"{name}: LEFTOVERS"] += 1
            if not same:
                print(f"{name}, {how}, {limits}: {first}, then {status}\n{said[-1500:]}")
    return found


def study_kills(place: Path, most: int) -> Counter:
    """A study of one task, killed before operations of its own and, with its workers, at random."""
    (place / "study.yaml").write_text(
        f"model: {place / 'model'}\ngeneral: {{a: {place / 'a.txt'}}}\n"
        f"held_out: {{a: {place / 'a.txt'}}}\nmethods: [base, lora-mu, blend]\nseeds: [0]\n"
        f"phi: {{blend: [1]}}\nwork: {place / 'study-work'}\n"
        f"tasks: {{t: {{train: {place / 't.jsonl'}, test: {place / 't.jsonl'}}}}}\n"
        "record: {block_size: 32, batch_size: 4, sequences: 4}\n"
        "tune: {max_steps: 4, batch_size: 4}\n"
        "eval: {block_size: 32, text_blocks: 2, task_rows: 4}\n"
    )
    work = place / "study-work"

    def go(results: str, **limits: Any) -> tuple[int, int, str]:
        argv = ["study", str(place / "study.yaml"), "--results", str(place / results)]
        return run(argv, **limits)

    def scores(results: str) -> list[Any]:
        lines = read_lines(place / results)
        return sorted([line["key"], str(line["text"]), str(line["task"])] for line in lines)

    began = time.monotonic()
    status, operations, said = go("whole.jsonl")
    if status:
        raise SystemExit(f"The study failed: {said[-2000:]}")
    took, whole = time.monotonic() - began, scores("whole.jsonl")
    draw = random.Random(0)
    points = min(operations, most // 2)
    tries: list[dict[str, Any]] = [{"kill_at": i * operations // points} for i in range(points)]
    tries += [{"seconds": draw.uniform(0, took)} for _ in range(most - points)]
    found: Counter = Counter()
    for limits in tries:
        shutil.rmtree(work, ignore_errors=True)
        (place / "killed.jsonl").unlink(missing_ok=True)
        first, _, _ = go("killed.jsonl", **limits)
        found["study: killed"] += first != 0
        status, _, said = go("killed.jsonl")
        same = not status and scores("killed.jsonl") == whole
        found[f"study: {'went on to the same scores' if same else 'DIFFERENT'}"] += 1
        if not same:
            print(f"study, {limits}: {first}, then {status}\n{said[-1500:]}")
    return found


GOOD_TASK = """task: quiz
dataset_path: json
dataset_kwargs: {data_files: "{rows}"}
test_split: train
output_type: multiple_choice
doc_to_target: answer
"""
GOOD_LINES = {
    "doc_to_text": 'doc_to_text: "{{prompt}}"\n', "doc_to_choice": "doc_to_choice: choices\n",
}  # fmt: skip
HOSTILE = {
    "template": 'doc_to_text: "{{ cycler.__init__.__globals__.os.system(\'touch {mark}\') }}"\n',
    "choices": 'doc_to_choice: "{{ self.__init__.__globals__ }}"\n',
    "function": "process_docs: !function {folder}/evil.docs\n",
    "python tag": 'description: !!python/object/apply:os.system ["touch {mark}"]\n',
    "metric folder": "metric_list: [{metric: {folder}/evil}]\n",
    "endless": 'doc_to_text: "{% for i in range(10**9) %}{{ 9**9**9 }}{% endfor %}"\n',
    "huge": 'doc_to_text: "{{ \'x\' * 10**10 }}"\n',
}  # fmt: skip
"""Task files for lm-evaluation-harness that want to run code, or never to end."""


def hostile(place: Path) -> Counter:
    """Task files, an adapter and a model that want to run code."""
    mark, folder = place / "ran", place / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\ndef docs(d): return d\n")
    rows, text = place / "t.jsonl", str(place / "a.txt")
    found: Counter = Counter()

    def tried(what: str, argv: list[str]) -> None:
        status, _, said = run(["eval", "--device", "cpu", *argv], seconds=300)
        outcome = "refused" if status == 2 and "Traceback" not in said else "NOT REFUSED"
        found[f"hostile {what}: {'RAN' if mark.exists() else outcome}"] += 1
        if outcome != "refused" or mark.exists():
            print(f"hostile {what}: {status}\n{said[-1500:]}")
        mark.unlink(missing_ok=True)

    model = str(place / "model")
    good = place / "good.yaml"
    good.write_text(GOOD_TASK.replace("{rows}", str(rows)) + "".join(GOOD_LINES.values()))
    status, _, said = run(["eval", "--device", "cpu", "--model", model, "--lm-eval", str(good)])
    if status:
        raise SystemExit(f"A task file that is none of those failed: {said[-2000:]}")
    for what, line in HOSTILE.items():
        task = folder / "task.yaml"
        line = line.replace("{mark}", str(mark)).replace("{folder}", str(folder))
        lines = {**GOOD_LINES, line.partition(":")[0]: line}
        task.write_text(GOOD_TASK.replace("{rows}", str(rows)) + "".join(lines.values()))
        tried(what, ["--model", model, "--lm-eval", str(task)])
    code = folder / "model"
    shutil.copytree(place / "model", code)
    config = json.loads((code / "config.json").read_text())
    (code / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\n")
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
    config |= {"model_type": "evil", "auto_map": names}
    (code / "config.json").write_text(json.dumps(config))
    tried("remote code", ["--model", str(code), "--text", text])
    pickled = folder / "adapter"
    shutil.copytree(place / "tune", pickled)
    weights = load_file(pickled / "adapter_model.safetensors")
    (pickled / "adapter_model.safetensors").unlink()
    torch.save(weights, pickled / "adapter_model.bin")
    tried("pickle", ["--model", model, "--adapter", str(pickled), "--text", text])
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
    nu, mu, model = place / "record", place / "tune", place / "model"
    (place / "task.yaml").write_text(GOOD_TASK + 'doc_to_text: "{{question}}"\n')
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
        model / "config.json": lambda: load(str(model)),
        model / "tokenizer.json": lambda: load(str(model)),
        model / "model.safetensors": lambda: load(str(model)),
        place / "task.yaml": lambda: read_task_file(place / "task.yaml"),
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
    parser.add_argument("--random", type=int, default=200)
    parser.add_argument("--full", type=int, default=50)
    parser.add_argument("--study", type=int, default=12)
    parser.add_argument("--mutations", type=int, default=5000)
    parser.add_argument("--page", type=Path, help="write the counts as a Markdown page")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        found = kills(place, given.kills, given.random, given.full)
        found += study_kills(place, given.study)
        found += hostile(place)
        found += mutations(place, given.mutations)
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
