"""Run by torchrun in test_fsdp.py: both phases, on one process or sharded by FSDP2 on several."""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard

import hlora
from hlora.core.kinds import kind_named
from hlora.hf.distributed import leave_together
from hlora.hf.peft import find_pairs, save_adapter, whole_adapter
from hlora.hf.record import save_importance
from tests.conftest import lora_model, token_rows

# A is 3 × 16 and 1 × 16: of two processes one has less of it, or nothing.
ADAPTER = {"r": 3, "rank_pattern": {"v_proj": 1}, "dtype": torch.float64}


def sharded(model):
    if torch.distributed.get_world_size() > 1:
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def loop(model, start, seed: int):
    """Four steps of eight rows, each process with its share. Yields after each."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = torch.tensor([row["input_ids"] for row in token_rows(seed=seed)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=rows[:1])  # leaves FSDP2 gathered
    start(model, optimizer)
    for batch in rows.split(8):
        mine = batch.chunk(world)[rank]
        model(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def both_phases(folder: Path, kind: str) -> None:
    nu = folder / "nu"
    if kind_named(kind).trained:
        record = hlora.Record(nu, kind=kind)
        model = sharded(lora_model(**ADAPTER))
        for _ in loop(model, record.start, seed=0):
            pass
        record.finish(model)
    else:
        model = lora_model(**ADAPTER)
        pairs, rows = find_pairs(model), torch.tensor([r["input_ids"] for r in token_rows()])
        found, _ = kind_named(kind).gather(model, pairs, rows)
        save_importance(nu, model, pairs, found, {"summary": {}})
        torch.distributed.barrier()
    model = sharded(lora_model(**ADAPTER))
    penalty = hlora.Penalty(nu, phi=5.0)
    values = [float(penalty.value()) for _ in loop(model, penalty.start, seed=2)]
    penalty.finish()
    adapter = whole_adapter(model)
    if torch.distributed.get_rank() == 0:
        save_adapter(model, folder / "mu", adapter)
        (folder / "R.json").write_text(json.dumps(values), "utf-8")


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    for kind in ("dense", "factored", "blend"):
        both_phases(folder / kind, kind)
    leave_together()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
