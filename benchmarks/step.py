"""What a LoRA step costs alone, and what recording and the penalty add to it.

    python -m benchmarks.step --shapes tiny smollm2 --json results/cost.json

In one run on one machine: the plain step, each addition, and the same in plain torch. An addition
is timed on its own, after a real backward pass, in turn with the others; on a GPU also as the
difference between whole steps with and without it, and as the time that the GPU is at work. The
floor is the time that the importance takes to be read (and to be written, in recording) at the
speed of a copy in the same run.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import hlora
from benchmarks import cost
from benchmarks.peers import PlainPenalty, PlainRecord
from benchmarks.shapes import TARGETS, WHOLE, lora_model
from hlora.core import store
from hlora.core.importance.sequences import SEQUENCES
from hlora.core.kinds import kind_named
from hlora.core.looks import ROWS
from hlora.core.steps import steps_of
from hlora.hf.peft import find_pairs
from hlora.hf.record import save_importance
from hlora.hf.regularize import LOOK_EVERY
from hlora.run.convert import convert
from hlora.run.machine import processor
from hlora.run.settings import ConvertSettings

RECORDS = ("dense", "factored")
PENALTIES = ("fp32", "bf16", "int8", "factored")
AT_BASE = ("kronecker", "sketch", "blend")
LOOKS = f"penalty, blend, a look in {LOOK_EVERY} steps"


class Bench:
    """One model with one batch."""

    def __init__(self, shape: str, targets: str, rank: int, batch: int, tokens: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = lora_model(shape, targets, rank, self.device)
        self.pairs = find_pairs(self.model)
        vocabulary = self.model.config.vocab_size
        self.ids = torch.randint(0, vocabulary, (batch, tokens), device=self.device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.trained, lr=1e-6)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def backward(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.backward()
        optimizer.step()
        optimizer.zero_grad()

    def steps(self, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            self.step(optimizer)

    def seconds(self, run: Callable[[], None], repeats: int) -> float:
        """Median of single runs."""
        times = []
        for _ in range(repeats):
            self.sync()
            began = time.perf_counter()
            run()
            self.sync()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def in_turn(self, runs: list[Callable[[], None]], repeats: int) -> list[float]:
        """Medians of several, taken in turn: what else the machine does falls on all of them."""
        times = [[self.seconds(run, 1) for run in runs] for _ in range(repeats)]
        return [statistics.median(of_one) for of_one in zip(*times, strict=True)]

    def bandwidth(self) -> float:
        """Bytes a second, read and written, of a large copy."""
        count = 1 << (30 if self.device.type == "cuda" else 28)
        one, two = (torch.zeros(count, dtype=torch.uint8, device=self.device) for _ in range(2))
        two.copy_(one)
        return 2 * count / self.seconds(lambda: two.copy_(one), 5)  # type: ignore[arg-type,return-value]

    def busy(self, run: Callable[[], None]) -> float | None:
        """Seconds that the GPU is at work in one run."""
        if self.device.type != "cuda":
            return None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            self.sync()
        return sum(e.self_device_time_total for e in profile.key_averages()) / 1e6

    def addition(self, optimizer: torch.optim.Optimizer, steps: int = 1) -> Callable[[], None]:
        """What an attached callback adds to steps, to be run alone after a real backward pass."""
        self.step(optimizer)
        self.backward()
        hooks = steps_of(optimizer)

        def added() -> None:
            for hook in (*hooks.observers, hooks.regularize, *hooks.after) * steps:
                hook(optimizer)

        added()
        return added

    def peak(self, run: Callable[[], None]) -> int | None:
        """Bytes on the GPU above those held before."""
        if self.device.type != "cuda":
            return None
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        self.sync()
        return torch.cuda.max_memory_allocated() - held


def measure(
    shape: str, targets: str, rank: int, batch: int, tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """One row for each addition."""
    bench = Bench(shape, targets, rank, batch, tokens)
    plain = bench.optimizer()
    for _ in range(2):
        bench.step(plain)
    step = bench.seconds(lambda: bench.step(plain), max(3, repeats // 5))
    step_peak = bench.peak(lambda: bench.step(plain))
    bandwidth = bench.bandwidth()
    rows = []
    attached = list(additions(bench, looks=True))
    alone = bench.in_turn([added for *_, added in attached], repeats)
    for (name, kept, optimizer, added), taken in zip(attached, alone, strict=True):
        steps = LOOK_EVERY if name == LOOKS else 1
        seconds = taken / steps
        floor = kept * (2 if name.startswith("record") else 1) / bandwidth
        busy = bench.busy(added)
        bench.model.zero_grad()
        whole = peak = None
        if bench.device.type == "cuda":
            whole = _difference(bench, plain, optimizer, repeats, steps)
            more = bench.peak(lambda o=optimizer, n=steps: bench.steps(o, n))  # type: ignore[misc]
            peak = (more or 0) - (step_peak or 0)
        rows.append(
            {
                "shape": shape, "targets": targets, "rank": rank, "batch": batch,
                "tokens": tokens, "matrices": len(bench.pairs), "addition": name,
                "step_ms": 1e3 * step, "added_ms": 1e3 * seconds,
                "added_percent": 100 * seconds / step, "floor_ms": 1e3 * floor,
                "busy_ms": None if busy is None else 1e3 * busy / steps,
                "whole_step_difference_ms": None if whole is None else 1e3 * whole,
                "added_peak_bytes": peak, "kept_bytes": kept,
            }
        )  # fmt: skip
        print(
            f"{shape:<13}{targets:<11} r {rank:<3}{batch}×{tokens}  {name:<24}"
            f"{1e3 * step:9.1f} ms + {1e3 * seconds:7.2f} ms ({100 * seconds / step:5.2f} %)",
            flush=True,
        )
    return rows


def _difference(bench: Bench, plain: Any, other: Any, repeats: int, steps: int) -> float:
    """Median difference of whole steps, so many at a time, taken in turn."""
    differences = []
    for _ in range(repeats):
        one = bench.seconds(lambda: bench.steps(plain, steps), 1)
        two = bench.seconds(lambda: bench.steps(other, steps), 1)
        differences.append((two - one) / steps)
    return statistics.median(differences)


def additions(
    bench: Bench, *, looks: bool = False
) -> Iterator[tuple[str, int, torch.optim.Optimizer, Callable[[], None]]]:
    """A name, the bytes that it keeps, the optimizer that it is attached to, and what it adds:
    to one step, but where it looks at the predictions, to as many as there are from look to look.
    """
    with tempfile.TemporaryDirectory() as place:
        with contextlib.redirect_stdout(io.StringIO()):
            _importance(bench, Path(place))
        for name, start in _starts(bench, Path(place)):
            optimizer = bench.optimizer()
            kept = start(optimizer)
            yield name, kept, optimizer, bench.addition(optimizer)
        if looks:
            optimizer = bench.optimizer()
            kept = _penalty(bench, Path(place) / "blend", optimizer, look_every=LOOK_EVERY)
            yield LOOKS, kept, optimizer, bench.addition(optimizer, LOOK_EVERY)


def _importance(bench: Bench, folder: Path) -> None:
    """A dense importance of one step, and the same in every other form."""
    optimizer = bench.optimizer()
    recorder = hlora.Record(folder / "fp32", kind="dense")
    recorder.start(bench.model, optimizer)
    bench.step(optimizer)
    recorder.finish(bench.model)
    for to in PENALTIES[1:]:
        convert(ConvertSettings(folder=str(folder / "fp32"), to=to, output=str(folder / to)))
    rows = bench.ids.cpu()[:2].repeat(2, 1)
    for kind in AT_BASE:
        few, _ = kind_named(kind).gather(bench.model, bench.pairs, rows)
        # As many sequences as by default; which ones they are makes no difference to the time.
        again = {
            name: t.repeat(SEQUENCES // len(rows), 1, 1) if ".cores" in name else t
            for name, t in few.tensors().items()
        }
        importance = kind_named(kind).from_tensors(again)
        text = bench.ids.cpu().repeat(ROWS, 1)[:ROWS]
        importance = importance.watching(text, text)  # type: ignore[attr-defined]
        notes = {"recording": {}, "summary": {}}
        save_importance(folder / kind, bench.model, bench.pairs, importance, notes)


def _penalty(
    bench: Bench, folder: Path, optimizer: torch.optim.Optimizer, look_every: int = 0
) -> int:
    """Attach a penalty; the bytes of its importance."""
    held = hlora.Penalty(folder, phi=1e-6, anchor="base", look_every=look_every)
    held.start(bench.model, optimizer)
    return int(held.stored.info["files"][store.TENSORS]["bytes"])


def _starts(bench: Bench, folder: Path) -> list[tuple[str, Callable[[torch.optim.Optimizer], int]]]:
    """A name, and what attaches it to an optimizer and returns the bytes it keeps."""
    elements = sum(p.shape[0] * p.shape[1] for p in bench.pairs)
    sums = sum(p.shape[0] + p.shape[1] for p in bench.pairs)

    def record(kind: str) -> Callable[[torch.optim.Optimizer], int]:
        def start(optimizer: torch.optim.Optimizer) -> int:
            hlora.Record(folder / f"new-{kind}", kind=kind).start(bench.model, optimizer)
            return 4 * (elements if kind == "dense" else sums)

        return start

    def penalty(form: str) -> Callable[[torch.optim.Optimizer], int]:
        return lambda optimizer: _penalty(bench, folder / form, optimizer)

    def plain_record(optimizer: torch.optim.Optimizer) -> int:
        PlainRecord(bench.pairs, optimizer)
        return 4 * elements

    def plain_penalty(optimizer: torch.optim.Optimizer) -> int:
        Omega = store.load(folder / "fp32").importance.tensors()
        PlainPenalty(bench.pairs, optimizer, Omega, 1e-6)
        return 8 * elements  # Ω and θ^ν

    return [
        ("record, plain torch", plain_record),
        *((f"record, {kind}", record(kind)) for kind in RECORDS),
        ("penalty, plain torch", plain_penalty),
        *((f"penalty, {form}", penalty(form)) for form in (*PENALTIES, *AT_BASE)),
    ]


def machine() -> dict[str, Any]:
    """Where this was measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{torch.get_num_threads()} CPU threads, {processor()}",
        "torch": torch.__version__, "python": platform.python_version(),
        "hlora": hlora.__version__,
    }  # fmt: skip


def main() -> None:
    parser = cost.parser(__doc__)
    small = ["tiny", "smollm2"]
    everywhere = WHOLE if torch.cuda.is_available() else small
    parser.add_argument("--shapes", nargs="+", choices=WHOLE, default=everywhere)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=["q,v"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8])
    usual = 20 if torch.cuda.is_available() else 4
    parser.add_argument("--batches", nargs="+", type=int, default=[usual])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument(
        "--growth", choices=WHOLE, help="also more targets, ranks and batches of this shape"
    )
    parser.add_argument("--repeats", type=int, default=20 if torch.cuda.is_available() else 8)
    given = parser.parse_args()
    cases = list(itertools.product(given.shapes, given.targets, given.ranks, given.batches))
    if given.growth:
        cases += [
            (given.growth, "all-linear", 8, usual), (given.growth, "q,v", 32, usual),
            (given.growth, "q,v", 64, usual), (given.growth, "q,v", 8, 2 * usual),
        ]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for case in dict.fromkeys(cases):
        rows += measure(*case, given.tokens, given.repeats)
        cost.keep(given.json, "step", {"machine": machine(), "rows": rows})
    print(json.dumps(machine(), ensure_ascii=False))


if __name__ == "__main__":
    main()
