"""Run by torchrun in test_ddp.py: both phases on every process, results from rank 0."""

import os
import sys
from pathlib import Path

import torch

import hlora
from hlora.hf.distributed import leave_together
from hlora.hf.gauge import Gauge
from tests.conftest import lora_model, make_trainer, perturb, token_rows

KINDS = ["dense", "factored", "looks"]
"""The last goes on with predictions that differ by process."""


def differ_by_process() -> None:
    """As kernels that add in no fixed order do, only more: 1 ± 0.01 times what each finds."""
    inner, (rank, world) = Gauge._of, (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE"))
    off = 0.01 * (1 - 2 * rank) if world > 1 else 0.0
    Gauge._of = lambda gauge, rows: (1 + off) * inner(gauge, rows)


def main(folder: Path, batch: int) -> None:
    for kind in KINDS:
        one_kind(folder / kind, batch, kind)
    leave_together()


def one_kind(folder: Path, batch: int, kind: str) -> None:
    settings = {
        "per_device_train_batch_size": batch, "max_steps": 4, "ddp_backend": "gloo",
        "ddp_find_unused_parameters": False,
    }  # fmt: skip
    if kind == "looks":
        differ_by_process()
        penalty = hlora.Penalty(folder / "base", phi=1e3, look_every=1)
    else:
        model = lora_model(dtype=torch.float64)
        make_trainer(
            model, folder / "run", [hlora.Record(folder / "nu", kind=kind)], **settings
        ).train()
        penalty = hlora.Penalty(folder / "nu", phi=5.0)
    model = lora_model(dtype=torch.float64)
    if kind == "looks":  # at the base there would be nothing to see
        perturb(model)
    trainer = make_trainer(
        model, folder / "run", [penalty], rows=token_rows(seed=2), **settings,
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        model.save_pretrained(folder / "mu")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
