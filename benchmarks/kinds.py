"""Does factored importance hold as well as dense? The demo's story, over seeds.

    python -m benchmarks.kinds --seeds 0 1 2

One phase ν a seed records both kinds at once; the same phase μ then runs without a penalty, with
each kind, and with Ω = 1 (L2 to θ^ν: what the penalty does without importance). One JSON line a
run; started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import hlora
from benchmarks.step import machine
from hlora.cli import convert, tune
from hlora.cli.eval import Scores, score
from hlora.core import store
from hlora.data.chemistry import write_chemistry
from hlora.data.text import Blocks, Source, blocks, mix, stack
from hlora.files import write_whole
from hlora.run.adapters import new_adapter
from hlora.run.evaluate import pooled_forgetting
from hlora.run.models import load, load_adapter, pick_device
from hlora.run.progress import quiet_libraries
from hlora.run.settings import ConvertSettings, DemoSettings, RecordSettings
from hlora.run.training import seed_everything, train
from hlora.study.demo_general import SEEN, UNSEEN, write_general
from hlora.study.demo_story import FULL, QUICK, Size, held_out, record_settings, tune_settings

PAGE = """# Dense importance, factored importance, and none

The demo's chemistry and general text, each row trained from the same phase ν with the same seed.
Forgetting is in nats per token against the base model; "unseen" is code, which is in no training
text. Made by

```bash
python -m benchmarks.kinds --page {given.page}
```

which trains the seeds that `{given.results}` lacks and writes this page from it.

{table}
"""

ROWS = {
    "no penalty": ("dense", 0),
    "dense": ("dense", 1),
    "factored": ("factored", 1),
    "Ω = 1 (L2)": ("ones", 1),
    "Ω = 1 (L2), 10 φ": ("ones", 10),
}
"""What is compared: the importance folder that each takes, and how many times φ.

Importance sits where θ moves, so at the same φ and the same mean Ω = 1 pulls far less.
"""


def run_seed(demo: DemoSettings, size: Size, names: list[str]) -> list[dict[str, Any]]:
    """The named rows of one seed."""
    place = Path(demo.output)
    write_general(place / "data")
    write_chemistry(place / "data")
    nu = record_settings(demo, size)
    if not (place / "ones" / store.MARKER).exists():
        _record(place, nu)
    rows = []
    model, tokenizer = load(nu.model, dtype=nu.dtype, device=pick_device(nu.device))
    kinds, task = held_out(place / "data", tokenizer, nu.block_size, size)
    base = score(model, tokenizer, kinds, [], 8)["text"]
    for name in names:
        folder, times = ROWS[name]
        settings = replace(
            tune_settings(demo, size, "HLoRA"), importance=str(place / folder),
            output=str(place / "mu"), overwrite=True, resume=False, save_steps=0,
            phi=times * demo.phi,
        )  # fmt: skip
        tune.run(settings)
        adapted = load_adapter(model, place / "mu")
        rows.append(_row(name, demo, score(adapted, tokenizer, kinds, [task], 8), base))
        model = adapted.unload()  # type: ignore[operator]
        shutil.rmtree(place / "mu")
    return rows


def _record(place: Path, nu: RecordSettings) -> None:
    """One phase ν, recorded as dense and as factored; and Ω = 1 beside them."""
    for name in ("dense", "factored", "ones", "run"):
        shutil.rmtree(place / name, ignore_errors=True)
    model, tokenizer = load(nu.model, dtype=nu.dtype, device=pick_device(nu.device))
    seed_everything(nu.seed)
    text = {s.name: blocks(s, tokenizer, nu.block_size) for s in (Source.parse(t) for t in nu.text)}
    recorders = [hlora.Record(place / kind, kind=kind) for kind in ("dense", "factored")]
    settings = replace(nu, output=str(place / "run"), resume=False, save_steps=0)
    train(
        settings, new_adapter(model, nu), Blocks(mix(text, None, None)), recorders, what="ν",
        collate=stack,
    )  # fmt: skip
    nu_folder, ones = str(place / "factored"), str(place / "ones")
    convert.run(ConvertSettings(folder=nu_folder, to="ones", output=ones))


def _row(name: str, demo: DemoSettings, scores: Scores, base: dict[str, Any]) -> dict[str, Any]:
    text, task = scores["text"], scores["task"]["chemistry"]
    return {
        "row": name, "seed": demo.seed, "phi": demo.phi, "model": demo.model,
        "acc": task.acc, "nll": task.nll, "questions": task.n,
        "seen": pooled_forgetting([(base[k], text[k]) for k in SEEN]).nats,
        "unseen": pooled_forgetting([(base[UNSEEN], text[UNSEEN])]).nats,
        "tokens_per_kind": base[UNSEEN].tokens, "machine": machine(),
    }  # fmt: skip


MEASURES = {"acc": 100.0, "nll": 1.0, "seen": 1.0, "unseen": 1.0}
"""Measures by their key in a result, and what they are multiplied by."""
HEADINGS = ["accuracy %", "NLL", "forgetting, seen", "forgetting, unseen"]


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds with standard errors, and paired differences, seed by seed."""
    lines = [f"| | {' | '.join(HEADINGS)} |", "|---|---|---|---|---|"]
    by_row = {n: {r["seed"]: r for r in rows if r["row"] == n} for n in ROWS}
    seeds = sorted(set.intersection(*(set(v) for v in by_row.values())))

    def line(name: str, values: list[list[float]]) -> str:
        return f"| {name} | " + " | ".join(_mean(v) for v in values) + " |"

    for name, of in by_row.items():
        lines.append(line(name, [[k * of[s][m] for s in seeds] for m, k in MEASURES.items()]))
    for one, two in (("factored", "dense"), ("dense", "Ω = 1 (L2), 10 φ")):
        a, b = by_row[one], by_row[two]
        differences = [[k * (a[s][m] - b[s][m]) for s in seeds] for m, k in MEASURES.items()]
        lines.append(line(f"{one} − {two}", differences))
    first = rows[0]
    lines += [
        "",
        f"{len(seeds)} seeds, mean ± standard error over them (differences seed by seed); "
        f"φ {first['phi']:g}; {first['questions']} questions, {first['tokens_per_kind']:,} tokens "
        f"of each kind; {first['model']} on {first['machine']['device']}.",
    ]
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):+.3f} ± {error:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--phi", type=float, default=0.003)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--work", default="runs/kinds", help="folder for what is in between")
    parser.add_argument("--results", default="results/kinds.jsonl")
    parser.add_argument("--page", help="also write the table to this Markdown file")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    given = parser.parse_args()
    quiet_libraries()
    results = Path(given.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        [json.loads(x) for x in results.read_text("utf-8").splitlines()] if results.exists() else []
    )
    for seed in given.seeds:
        have = {r["row"] for r in rows if r["seed"] == seed}
        if have == set(ROWS):
            continue
        demo = DemoSettings(
            output=f"{given.work}/{seed}", seed=seed, phi=given.phi, model=given.model
        )
        missing = [name for name in ROWS if name not in have]
        new = run_seed(demo, QUICK if given.quick else FULL, missing)
        with results.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in new)
        rows += new
    print(table(rows))
    if given.page:
        write_whole(Path(given.page), PAGE.format(table=table(rows), given=given))
        print(f"Written to {given.page}.")


if __name__ == "__main__":
    main()
