"""Run by test_fsdp.py: both phases, on one process or sharded by FSDP2 on several."""

import json
import math
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

import hlora
from hlora.core.kinds import kind_named
from hlora.core.sharded import local
from hlora.hf.distributed import is_main, leave_together
from hlora.hf.peft import find_pairs, save_adapter, whole_adapter
from hlora.hf.record import save_importance
from tests.conftest import lora_model, token_rows
from tests.test_experts import mixture

CASES = {
    "loop": ["dense", "factored", "blend"],
    "experts": ["dense", "blend"],
    "trainer": ["factored", "blend"],  # the last: it tells accelerate that it shards
}
"""What is trained, and the kinds of importance that it is held by."""

# A is 3 × 16 and 1 × 16: of two processes one has less of it, or nothing.
ADAPTER = {"r": 3, "rank_pattern": {"v_proj": 1}, "dtype": torch.float64}


def adapted(how: str):
    """A tiny LLaMA; or a mixture whose experts are one parameter each, of a rank that halves."""
    return mixture("Qwen3Moe", torch.float64) if how == "experts" else lora_model(**ADAPTER)


def loop(part, seed: int, result, how: str):
    """Four steps of eight rows, each process with its share; what `result` says after each."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model = adapted(how)
    if world > 1:
        fully_shard(model)
    rows = torch.tensor([row["input_ids"] for row in token_rows(seed=seed)])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model(input_ids=rows[:1])  # leaves FSDP2's root gathered
    part.start(model, optimizer)
    found = []
    for step, batch in enumerate(rows.split(8)):
        mine = batch.chunk(world)[rank]
        model(input_ids=mine, labels=mine).loss.backward()
        if step == 2 and rank == world - 1:  # bad on one process, skipped by all
            local(trained[1].grad).fill_(math.nan)
        optimizer.step()
        optimizer.zero_grad()
        found.append(result(model))
    part.finish(*([model] if isinstance(part, hlora.Record) else []))
    return model, found


def by_loop(nu: Path, mu: Path, kind: str, how: str = "loop") -> list[float]:
    if kind_named(kind).trained:
        loop(hlora.Record(nu, kind=kind), 0, lambda model: None, how)
    penalty = hlora.Penalty(nu, phi=5.0)
    model, found = loop(penalty, 2, lambda model: float(penalty.value()), how)
    adapter = whole_adapter(model)
    if is_main():
        save_adapter(model, mu, adapter)
    return found


def trainer_with(folder: Path, part, seed: int):
    """accelerate shards on a GPU only: on a CPU it trains with DDP, whatever it is asked for. Told
    that this is one, it goes its own way through FSDP2, as configs/accelerate/fsdp2.yaml says.
    """
    world = distributed.get_world_size()
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8 // world, max_steps=4,
        learning_rate=1e-2, logging_steps=1, save_strategy="steps", save_steps=2, report_to=[],
        seed=0, disable_tqdm=True, use_cpu=True, ddp_backend="gloo",
    )  # fmt: skip
    if world > 1 and args.device.type == "cpu":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = lora_model(**ADAPTER)
    if not is_main():  # by fsdp_cpu_ram_efficient_loading rank 0 alone has read them
        for p in model.get_base_model().parameters():
            p.data.zero_()
    trainer = Trainer(model, args, train_dataset=token_rows(seed=seed))
    hlora.attach(trainer, part)
    return trainer


def by_trainer(nu: Path, mu: Path, kind: str) -> list[float]:
    """Sharded, each phase is resumed in its middle; on one process it is not."""
    resumes = [False, "checkpoint-2"] if distributed.get_world_size() > 1 else [False]
    if kind_named(kind).trained:
        for checkpoint in resumes:
            record = hlora.Record(nu, kind=kind, quiet=True, overwrite=True)
            trainer = trainer_with(nu.parent / "run-nu", record, 0)
            trainer.train(checkpoint and str(nu.parent / "run-nu" / checkpoint))
    how = {"phi": 5.0} if kind_named(kind).trained else {"forget_at_most": 1e-5}
    for checkpoint in resumes:
        penalty = hlora.Penalty(nu, **how)
        trainer = trainer_with(nu.parent / "run-mu", penalty, 2)
        trainer.train(checkpoint and str(nu.parent / "run-mu" / checkpoint))
    assert penalty.predicted is None or penalty.predicted > 1e-5  # so that it is scaled down
    assert (distributed.get_world_size() > 1) == hasattr(trainer.model, "reshard")
    trainer.save_model(str(mu))
    return [e["R"] for e in trainer.state.log_history if "R" in e]


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    for how, kinds in CASES.items():
        for kind in kinds:
            one_case(folder / how / kind, how, kind)
    leave_together()


def one_case(folder: Path, how: str, kind: str) -> None:
    nu, mu = folder / "nu", folder / "mu"
    if not kind_named(kind).trained:
        model = adapted(how)
        pairs, rows = find_pairs(model), torch.tensor([r["input_ids"] for r in token_rows()])
        found, _ = kind_named(kind).gather(model, pairs, rows)
        save_importance(nu, model, pairs, found, {"summary": {}})
        distributed.barrier()
    values = by_trainer(nu, mu, kind) if how == "trainer" else by_loop(nu, mu, kind, how)
    if is_main():
        (folder / "R.json").write_text(json.dumps(values), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
