"""What was to be reached on an H100, and whether it was."""

from __future__ import annotations

from typing import Any

from benchmarks.importance import TEXT
from benchmarks.step import LOOKS

SHAPE, SMALL = "llama-3.2-3b", "smollm2"
MIB, GIB = 1 << 20, 1 << 30

ADDED = {
    "record, dense": 1.5, "record, factored": 1.0, "penalty, fp32": 1.0, "penalty, factored": 1.0,
    "penalty, blend": 1.0, LOOKS: 2.0,
}  # fmt: skip
"""At most, in percent of a LoRA step of 20 × 128 tokens, r 8 on q and v."""
ADDED_SMALL = {"penalty, blend": 2.0, LOOKS: 2.0}
"""The same of SmolLM2-135M and 8 × 128 tokens, on two cores and no GPU."""
SECONDS = {SHAPE: 60.0, SMALL: 120.0}
"""At most, to gather a blend, the writing of its text included."""
PEAK = 0.05
"""At most, in GiB beyond the importance itself."""
STORED = {"factored": 0.01, "dense int8": 3.0}
"""At most, in percent of EWC-LoRA's."""
BLEND = 64.0
"""At most, in MiB on disk."""
FASTER = 100.0
"""At least: EWC-LoRA's Fisher information, as published, over the whole of phase ν."""


def verdicts(
    step: list[dict[str, Any]], importance: list[dict[str, Any]], storage: list[dict[str, Any]]
) -> list[tuple[str, str, str, str]]:
    """What, the goal, what was measured and a word on it, for the rows of the benchmarks."""
    found = []

    def add(what: str, goal: float, value: float | None, unit: str, *, least: bool = False) -> None:
        sign = "≥" if least else "≤"
        if value is None:
            shown, word = "", "not measured"
        else:
            shown = f"{value:.3g} {unit}"
            word = "reached" if (value >= goal if least else value <= goal) else "missed"
        found.append((what, f"{sign} {goal:g} {unit}", shown, word))

    def of_step(shape: str, batch: int) -> dict[str, dict[str, Any]]:
        return {
            r["addition"]: r for r in step
            if (r["shape"], r["targets"], r["rank"], r["batch"], r["tokens"])
            == (shape, "q,v", 8, batch, 128)
        }  # fmt: skip

    large, small = of_step(SHAPE, 20), of_step(SMALL, 8)
    for where, rows, goals in (("", large, ADDED), (f"{SMALL}, ", small, ADDED_SMALL)):
        for name, goal in goals.items():
            share = rows[name]["added_percent"] if name in rows else None
            add(f"{where}{name}: of a step", goal, share, "%")
    for name in ADDED:
        peak = large[name]["added_peak_bytes"] if name in large else None
        add(f"{name}: peak memory", PEAK, None if peak is None else peak / GIB, "GiB")
    sizes = next((r for r in storage if (r["shape"], r["targets"]) == (SHAPE, "q,v")), None)
    for form, goal in STORED.items():
        share = 100 * sizes["bytes"][form] / sizes["ewc_bytes"] if sizes else None
        add(f"{form}: on disk, of EWC-LoRA's", goal, share, "%")
    add("blend: on disk", BLEND, sizes["bytes"]["blend"] / MIB if sizes else None, "MiB")
    for shape, goal in SECONDS.items():
        seconds = {r["method"]: r["seconds"] for r in importance if r["shape"] == shape}
        whole = seconds["blend, at the base"] + seconds[TEXT] if seconds else None
        add(f"{shape}, blend gathered, with its text", goal, whole, "s")
    seconds = {r["method"]: r["seconds"] for r in importance if r["shape"] == SHAPE}
    ours = seconds.get("HLoRA factored, phase ν whole")
    ratio = seconds["EWC-LoRA, as published"] / ours if ours else None
    add("phase ν faster than EWC-LoRA's Fisher", FASTER, ratio, "times", least=True)
    return found
