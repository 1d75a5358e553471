"""What it costs to get an importance: HLoRA's phase ν against EWC's Fisher information.

    python -m benchmarks.importance --shapes tiny smollm2

Few steps and few sequences are timed, in one run, and scaled to the whole: the paper's numbers are
20,000 sequences for EWC-LoRA; a lean Fisher takes 200; phase ν takes as many steps as you train.
The phase ν is given whole and as what recording adds to a LoRA training that is done anyway. Peak
memory is the GPU's, or this process's where there is none, the model and all else included.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hlora
from benchmarks import cost
from benchmarks.shapes import WHOLE, lora_model
from benchmarks.step import Bench, machine
from hlora.core.importance import fisher_original
from hlora.core.importance.fisher import LEAN, Fisher
from hlora.core.importance.fisher_original import SEQUENCES
from hlora.core.importance.sequences import SEQUENCES as SEQUENCES_AT_BASE
from hlora.core.kinds import kind_named
from hlora.files import size
from hlora.hf.peft import find_pairs
from hlora.run.machine import peak_bytes, reset_peak
from hlora.run.own_text import own_text
from hlora.run.phases import WATCHED

TEXT = "the text that the model writes"
WRITTEN = (SEQUENCES_AT_BASE + WATCHED) // 2
"""Chats, or other texts: a gathering writes as many of each, in a batch."""


class Words:
    """All that writing asks of a tokenizer, for random weights that have none."""

    bos_token_id, chat_template = 0, None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.bos_token_id]}


def measure(shape: str, steps: int, batch: int, tokens: int, timed: int) -> list[dict[str, Any]]:
    """One row a method."""
    rows = []

    def row(method: str, seconds: float, peak: int | None, disk: int, of: str) -> None:
        rows.append(
            {
                "shape": shape, "method": method, "seconds": seconds, "peak_bytes": peak,
                "disk_bytes": disk, "timed": of, "batch": batch, "tokens": tokens,
            }
        )  # fmt: skip
        print(
            f"{shape:<13}{method:<34}{seconds:12.1f} s {'' if peak is None else size(peak):>10} "
            f"at the peak {size(disk):>10} on disk  ({of})",
            flush=True,
        )

    blocks = _ours(shape, steps, batch, tokens, timed, row)
    _original(shape, blocks[:timed], row)
    return rows


def _ours(shape: str, steps: int, batch: int, tokens: int, timed: int, row: Any) -> torch.Tensor:
    bench = Bench(shape, "q,v", 8, batch, tokens)
    plain = bench.optimizer()
    bench.step(plain)
    alone = bench.seconds(lambda: bench.step(plain), timed)
    for kind in ("dense", "factored"):
        optimizer = bench.optimizer()
        recorder = hlora.Record(Path("runs") / "unused", kind=kind)
        recorder.start(bench.model, optimizer)
        added = bench.seconds(bench.addition(optimizer), timed)
        bench.model.zero_grad()
        peak = memory(lambda o=optimizer: bench.step(o))  # type: ignore[misc]
        disk = kind_named(kind).bytes([p.shape for p in bench.pairs])
        of = f"{timed} of {steps} steps"
        row(f"HLoRA {kind}, phase ν whole", steps * (alone + added), peak, disk, of)
        row(f"HLoRA {kind}, added by recording", steps * added, None, disk, of)
        del recorder, optimizer
    blocks = torch.randint(0, bench.model.config.vocab_size, (timed * 4, tokens))

    def lean() -> None:
        Fisher.gather(bench.model, bench.pairs, blocks, batch_size=4)

    lean()
    each = bench.seconds(lean, 1) / len(blocks)
    disk = kind_named("fisher").bytes([p.shape for p in bench.pairs])
    row("EWC, lean", LEAN * each, memory(lean), disk,
        f"{len(blocks)} of {LEAN} sequences")  # fmt: skip
    for kind in ("kronecker", "blend"):
        of = kind_named(kind)

        def gather(of: Any = of) -> None:
            of.gather(bench.model, bench.pairs, blocks, batch_size=4)

        gather()
        each = bench.seconds(gather, 1) / len(blocks)  # the pass that finds the bases included
        disk = of.bytes([p.shape for p in bench.pairs], sequences=SEQUENCES_AT_BASE)
        row(f"{kind}, at the base", SEQUENCES_AT_BASE * each, memory(gather), disk,
            f"{len(blocks)} of {SEQUENCES_AT_BASE} sequences")  # fmt: skip

    def write() -> None:
        own_text(bench.model, Words(), WRITTEN, tokens)

    write()
    count = SEQUENCES_AT_BASE + WATCHED
    row(TEXT, bench.seconds(write, 1) * count / WRITTEN, memory(write), 4 * count * tokens,
        f"{WRITTEN} of {count} sequences")  # fmt: skip
    return blocks


def _original(shape: str, blocks: torch.Tensor, row: Any) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = lora_model(shape, "q,v", 8, device)
    blocks = blocks.to(device)
    pairs = find_pairs(model)
    fisher_original.gather(model, pairs, blocks[:1])
    found: dict[str, Any] = {}

    def gather() -> None:
        began = time.perf_counter()
        _, found["disk"] = fisher_original.gather(model, pairs, blocks)
        found["each"] = (time.perf_counter() - began) / len(blocks)

    peak = memory(gather)
    row("EWC-LoRA, as published", SEQUENCES * found["each"], peak, found["disk"],
        f"{len(blocks)} of {SEQUENCES} sequences")  # fmt: skip


def memory(run: Callable[[], None]) -> int | None:
    """Peak bytes while something runs, the model included."""
    gc.collect()
    if not torch.cuda.is_available() and sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # glibc's: free memory is not to count
            ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    run()
    return peak_bytes()


def main() -> None:
    parser = cost.parser(__doc__)
    everywhere = WHOLE if torch.cuda.is_available() else ["tiny", "smollm2"]
    parser.add_argument("--shapes", nargs="+", choices=WHOLE, default=everywhere)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of phase ν")
    usual = 20 if torch.cuda.is_available() else 4
    parser.add_argument("--batch", type=int, default=usual)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--timed", type=int, default=3)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in given.shapes:
        rows += measure(shape, given.steps, given.batch, given.tokens, given.timed)
        cost.keep(given.json, "importance", {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
