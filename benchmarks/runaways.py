"""Whether one sequence outweighs all others in an importance, and where its gradient is.

    python -m benchmarks.runaways --importance base --text runs/data/perl.jsonl --dtype fp32 bf16

By kind of text (the rows that the importance was gathered on, and --text): the largest ‖g‖² of a
sequence over the median one's, at any matrix; at how many matrices it is beyond the limit that a
gathering sets; which matrix that is, and the text around the token that has most of it.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from hlora.core import store
from hlora.core.importance.bounded import LIMIT
from hlora.core.importance.passes import backward_passes
from hlora.data.source import Source
from hlora.data.text import blocks
from hlora.hf.peft import find_pairs
from hlora.run.models import load, new_adapter
from hlora.run.settings import RecordSettings


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--importance", nargs="*", default=[], help="their own text is looked at")
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--blocks", type=int, default=48, help="rows of each --text")
    parser.add_argument("--tokens", type=int, default=128, help="of a row of --text")
    parser.add_argument("--dtype", nargs="+", default=["fp32"])
    parser.add_argument("--seed", type=int, default=1, help="of the sampled labels")
    given = parser.parse_args(argv)
    print("| text | rows | dtype | largest | beyond, matrices | matrix | token |")
    print("|---|---|---|---|---|---|---|")
    for dtype in given.dtype:
        model, tokenizer = load(given.model, dtype=dtype)
        model = new_adapter(model, RecordSettings())
        kinds = {f"own text of {i}": store.load(i).importance.written for i in given.importance}
        for source in map(Source.parse, given.text):
            kinds[source.name] = blocks(source, tokenizer, given.tokens, given.blocks)
        for kind, rows in kinds.items():
            if rows is None:
                raise SystemExit(f"{kind}: it keeps none.")
            sizes, places = looked_at(model, rows.long(), given.seed)
            largest = {n: float(of.max() / of.median()) for n, of in sizes.items()}
            most = max(largest, key=lambda n: largest[n])
            which = int(sizes[most].argmax())
            at, row = int(places[most][which]), rows[which]
            around = tokenizer.decode(row[max(0, at - 2) : at + 3])
            print(
                f"| {kind} | {len(rows)} | {dtype} | {largest[most]:.1f} | "
                f"{sum(of > LIMIT for of in largest.values())} of {len(largest)} | {most} | "
                f"{at}: {around!r} |",
                flush=True,
            )


def looked_at(
    model: torch.nn.Module, rows: Tensor, seed: int, labels: str = "model"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By matrix ‖g‖² of each row, and the token with the largest ‖δ‖²‖x‖², (N,) each."""
    sizes: dict[str, list[Tensor]] = {}
    places: dict[str, list[Tensor]] = {}

    def take(name: str, delta: Tensor, x: Tensor) -> None:
        size, place = of_batch(delta, x)
        sizes.setdefault(name, []).append(size)
        places.setdefault(name, []).append(place)

    backward_passes(model, find_pairs(model), rows, take, seed=seed, labels=labels)
    return (
        {n: torch.cat(of) for n, of in sizes.items()},
        {n: torch.cat(of) for n, of in places.items()},
    )


def of_batch(delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """‖δᵀx‖² of each row, and the token with the largest ‖δ‖²‖x‖², from (b, T, m) and (b, T, n)."""
    d, x = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (delta, x))
    places = (d.square().sum(2) * x.square().sum(2)).argmax(1)
    return ((x @ x.mT) * (d @ d.mT)).sum((1, 2)), places


if __name__ == "__main__":
    main()
