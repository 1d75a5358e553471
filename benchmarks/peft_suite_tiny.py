"""That the penalty joins and holds in PEFT's own method comparison: on a CPU, with a tiny model.

    python -m benchmarks.peft_suite_tiny peft/method_comparison/MetaMathQA runs/peft-suite

The suite's folder and one to work in. The suite's files run as they are; what stands in for a GPU,
a model behind a license and data from the hub is made here, so nothing is told of accuracy. Prints
the table of docs/peft-suite.md: the suite alone, and with each φ.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from benchmarks import peft_suite

ALONE, PHIS = "alone", (0, 1, 4, 16)
EXPERIMENT = "experiments/lora/hlora-tiny"
LIKE = "experiments/lora/llama-3.2-3B-rank32"
SETTINGS = {
    "max_steps": 100, "eval_steps": 50, "batch_size_eval": 30,
    "optimizer_kwargs": {"lr": 1e-2, "weight_decay": 0.1},
    "generation_kwargs": {"max_length": 800, "max_new_tokens": 24},
}  # fmt: skip
FILES = {"MetaMathQA": "metamath", "gsm8k": "gsm8k", "finewiki": "wiki"}
COLUMNS = {
    "metamath": {"type", "query", "original_question", "response"},
    "gsm8k": {"question", "answer"},
}
WIDTH, LAYERS, STEPS, TOKENS = 64, 4, 400, 96


def make(work: Path) -> None:
    """The model, which has read most of Python's documentation; the rest of it; and sums."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from hlora.run.models import embedded_folder

    torch.manual_seed(0)
    draw = random.Random(0)
    for name, count in (("metamath/train", 1200), ("gsm8k/train", 60), ("gsm8k/test", 30)):
        columns = COLUMNS[name.split("/")[0]]
        rows = [{k: v for k, v in _sum(draw).items() if k in columns} for _ in range(count)]
        _write(work / "data" / f"{name}.jsonl", rows)
    pages = [topics[k] for k in draw.sample(sorted(topics), len(topics))]
    words = [page.split() for page in pages[:12]]
    pieces = [" ".join(w[i : i + 90]) for w in words for i in range(0, len(w), 90)]
    _write(work / "data" / "wiki" / "train.jsonl", [{"text": p} for p in pieces[:100]])

    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    ids = torch.tensor(tokenizer("\n".join(pages[12:]))["input_ids"])
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=160,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - TOKENS, (8, 1))
        rows = ids[starts + torch.arange(TOKENS)]
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")


def _sum(draw: random.Random) -> dict[str, str]:
    """A row in the columns of both."""
    a, b = draw.randint(2, 40), draw.randint(2, 40)
    asked = f"There are {a} apples and {b} pears. How many are there?"
    told = f"{a} and {b} are {a + b}.\n#### {a + b}"
    return {
        "type": draw.choice(["GSM_Rephrased", "GSM_SV", "GSM_FOBAR", "GSM_AnsAug"]),
        "query": asked, "original_question": asked, "response": f"{told}\nThe answer is: {a + b}",
        "question": asked, "answer": told,
    }  # fmt: skip


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


class _Device(str):
    """`cpu`, which passes where the suite asks for `cuda`."""

    def __eq__(self, other: object) -> bool:
        return other == "cuda" or str.__eq__(self, other)

    __hash__ = str.__hash__


def stand_in(data: Path) -> None:
    """For the GPU and the hub, before the suite asks for either."""
    import datasets
    import peft.utils
    from transformers import AutoModelForCausalLM

    peft.utils.infer_device = lambda: _Device("cpu")
    for name in ("reset_peak_memory_stats", "manual_seed_all", "empty_cache"):
        setattr(torch.cpu, name, lambda *_: None)
    for name in ("max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(torch.cpu, name, lambda *_: 0)
    torch.cpu.get_device_name = lambda _: "a CPU in place of a GPU"  # type: ignore[attr-defined]
    read, load = datasets.load_dataset, AutoModelForCausalLM.from_pretrained

    def from_file(name: str, *_: Any, **given: Any) -> Any:
        folder = data / FILES[name.split("/")[-1]]
        return read("json", data_files={p.stem: str(p) for p in folder.iterdir()}, **given)

    datasets.load_dataset = from_file
    AutoModelForCausalLM.from_pretrained = lambda *of, **given: load(  # type: ignore[assignment]
        *of, **{**given, "device_map": "cpu"}
    )


def one(suite: Path, work: Path, phi: str) -> None:
    """In a process of its own: the suite seeds, and is imported, once."""
    stand_in(work / "data")
    penalty = None if phi == ALONE else peft_suite.held(work / "base", float(phi))
    peft_suite.run(suite, ["-v", EXPERIMENT], penalty)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("suite", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    suite, work = args.suite.resolve(), args.work.resolve()
    if args.one:
        one(suite, work, args.one)
    else:
        table(suite, work)


def table(suite: Path, work: Path) -> None:
    if not (suite / LIKE).is_dir():
        sys.exit(f"error: {suite} has no {LIKE}: give method_comparison/MetaMathQA of PEFT.")
    print(f"Making a model ({STEPS} steps) and its importance.", file=sys.stderr, flush=True)
    make(work)
    shutil.rmtree(suite / EXPERIMENT, ignore_errors=True)
    shutil.copytree(suite / LIKE, suite / EXPERIMENT)
    settings = json.dumps({"model_id": str(work / "model"), **SETTINGS})
    (suite / EXPERIMENT / "training_params.json").write_text(settings)
    hlora_record = [
        "record", "--model", str(work / "model"), "--kind", "blend", "--sequences", "64",
        "--lora-rank", "32", "--lora-alpha", "64", "--output", str(work / "base"), "--overwrite",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "hlora", *hlora_record], check=True)
    print("| run | loss, steps 1–50 | 51–100 | test accuracy | forgetting | R at the end |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for phi in (ALONE, *map(str, PHIS)):
        print(_row(suite, work, phi), flush=True)


def _row(suite: Path, work: Path, phi: str) -> str:
    command = [sys.executable, "-m", __spec__.name, str(suite), str(work), "--one", phi]
    log = work / f"{phi}.log"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    said = log.read_text("utf-8")
    saved = re.findall("^Saved log to: (.+)$", said, re.MULTILINE)
    trained = json.loads(Path(saved[-1]).read_text("utf-8"))["train_info"] if saved else {}
    if code or trained.get("status") != "success":
        which = "The run without a penalty" if phi == ALONE else f"The run with φ {phi}"
        sys.exit(f"error: {which} failed, and {log} says why.")
    *seen, last = trained["metrics"]
    R = re.findall("^φ .*, R ([^ ]+) at the end$", said, re.MULTILINE)
    losses = [m["train loss"] for m in seen]
    cells = [*losses, last["test accuracy"], last["forgetting"], *(R or "–")]
    name = "`run.py` alone" if phi == ALONE else f"φ {phi}"
    return f"| {' | '.join(map(str, [name, *cells]))} |"


if __name__ == "__main__":
    main()
