"""What an importance predicts that adapters forget, what its text shows, and what other text does.

    python -m benchmarks.gauge --importance base --adapter lora held --text licences.jsonl
    python -m benchmarks.gauge ... --behind '<|im_start|>'

For each adapter: forgetting as the importance predicts it; as measured on text that the base model
writes (the rows that the importance keeps, or as many new ones); and on each kind of `--text`. All
in nats per token of KL divergence from the base model. With `--behind`, each kind also with that
token before every row: a model that reads another first token may have forgotten less.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from hlora.core import store
from hlora.core.lowrank import LowRank
from hlora.core.pairs import group
from hlora.data.source import Source
from hlora.data.text import blocks
from hlora.files import write_json
from hlora.hf.peft import find_pairs
from hlora.run.evaluate import divergence
from hlora.run.models import load, load_adapter
from hlora.run.own_text import own_text
from hlora.run.phases import OTHER_SEED, WATCHED

OWN = "own text"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--importance", required=True)
    parser.add_argument("--adapter", nargs="+", required=True)
    parser.add_argument("--text", nargs="*", default=["python-docs@test"])
    parser.add_argument("--blocks", type=int, default=48, help="rows of each kind")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of a row of --text")
    parser.add_argument("--behind", nargs="*", default=[], help="tokens to put before the rows")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--json", type=Path, help="also write everything here")
    given = parser.parse_args(argv)
    importance = store.load(given.importance).importance
    base, tokenizer = load(given.model, dtype=given.dtype)
    own = importance.watched
    if own is None:
        own = own_text(base, tokenizer, WATCHED, 128, seed=OTHER_SEED)
    kinds = {OWN: own.long()} | {
        s.name: blocks(s, tokenizer, given.tokens, given.blocks)
        for s in map(Source.parse, given.text)
    }
    for token in given.behind:
        before = tokenizer.convert_tokens_to_ids(token)
        kinds |= {
            f"{s} behind `{token}`": torch.nn.functional.pad(kinds[s], (1, 0), value=before)
            for s in (Source.parse(t).name for t in given.text)
        }
    print("| adapter | predicted |", " | ".join(kinds), "|")
    print("|---|" + "---|" * (len(kinds) + 1))
    rows = []
    for folder in given.adapter:
        model = load_adapter(base, folder, trainable=True)
        groups = group(find_pairs(model))
        importance.arrange(groups)
        changes = [LowRank(g.s * B, A) for g, (B, A) in ((g, g.factors()) for g in groups)]
        with torch.no_grad():
            predicted = float(importance.forgetting(groups, changes))
        found = {name: divergence(model, of) for name, of in kinds.items()}
        shown = " | ".join(f"{f.nats:.4f} ± {f.se:.4f}" for f in found.values())
        print(f"| {Path(folder).name} | {predicted:.4f} | {shown} |", flush=True)
        rows.append(
            {"adapter": folder, "predicted": predicted}
            | {name: [f.nats, f.se] for name, f in found.items()}
        )
        base = model.unload()  # type: ignore[operator]
    if given.json:
        write_json(given.json, {"rows": rows, **vars(given), "json": str(given.json)})


if __name__ == "__main__":
    main()
