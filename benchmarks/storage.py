"""What each importance takes on disk and in memory, at the sizes of whole models.

    python -m benchmarks.storage

Models are made without weights, so every shape can be counted on every machine. Ours are the sizes
that `hlora inspect` shows (a test compares them with files); EWC-LoRA keeps one float32 for each
parameter of the base model.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import cost
from benchmarks.shapes import TARGETS, WHOLE, lora_model
from hlora.core.importance.sequences import SEQUENCES
from hlora.core.kinds import kind_named
from hlora.core.pairs import Pair, base_parameters
from hlora.files import size
from hlora.hf.peft import find_pairs

FORMS = {
    "factored": ("factored", "fp32"), "dense int8": ("dense", "int8"),
    "dense bf16": ("dense", "bf16"), "dense fp32": ("dense", "fp32"), "blend": ("blend", "fp32"),
}  # fmt: skip


def size_of(pairs: list[Pair], kind: str, storage: str) -> int:
    """Bytes of an importance of these targets."""
    return kind_named(kind).bytes([p.shape for p in pairs], storage, sequences=SEQUENCES)


def rows() -> list[dict[str, Any]]:
    """One row for each shape and choice of targets."""
    found = []
    for shape in WHOLE:
        for targets in TARGETS:
            model = lora_model(shape, targets, 8, torch.device("meta"))
            pairs = find_pairs(model)
            ewc = sum(4 * p.numel() for p in base_parameters(model).values())
            ours = {name: size_of(pairs, *form) for name, form in FORMS.items()}
            found.append({"shape": shape, "targets": targets, "ewc_bytes": ewc, "bytes": ours})
    return found


def main() -> None:
    given = cost.parser(__doc__).parse_args()
    found = rows()
    for r in found:
        ours = "  ".join(
            f"{name} {size(n)} ({100 * n / r['ewc_bytes']:.3f} %)" for name, n in r["bytes"].items()
        )
        print(f"{r['shape']:<13}{r['targets']:<11}{ours}  EWC-LoRA {size(r['ewc_bytes'])}")
    cost.keep(given.json, "storage", {"rows": found})


if __name__ == "__main__":
    main()
