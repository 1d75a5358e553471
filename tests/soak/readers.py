"""Every file that is read, and what reads it."""

from __future__ import annotations

import copy
import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hlora.cli.options import parse
from hlora.core import store
from hlora.data.answers import answer_rows
from hlora.data.encode import encode
from hlora.data.source import Source
from hlora.data.tasks import load_task
from hlora.data.text import blocks
from hlora.files import checksum, seal, write_json
from hlora.run import phases
from hlora.run.models import load, load_adapter
from hlora.run.settings import TuneSettings
from hlora.run.taskfile import read_task_file
from hlora.study.rows import read as read_results
from hlora.study.spec import read_study
from tests.soak.mutations import Reader, command
from tests.soak.place import MODEL, Command
from tests.tiny import questions, write_rows, write_text

FORMAT = "prompt: '{{prompt}} ?'\nchoices: choices\nanswer: '{{answer}}'\n"
HARNESS = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: t.jsonl}
output_type: multiple_choice
test_split: train
doc_to_text: '{{prompt}}'
doc_to_choice: '{{choices}}'
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SETTINGS = "model: model\ntask: t.jsonl\noutput: o\nlearning_rate: 1e-3\ntraining: {optim: sgd}\n"


def readers() -> list[Reader]:
    """Of all that lies in the folder after `record` and `tune` ran in it."""
    _write_more()
    words = load("model")[1]
    return [*_importance(), *_adapter(), *_model(), *_data(words), *_settings(), *_runs()]


def _write_more() -> None:
    nu = Path("record")
    shutil.copytree(nu, "seen")
    write_rows(Path("chat.jsonl"), _chats())
    Path("t.csv").write_text("prompt,completion\n" + "a b,c\n" * 20, "utf-8")
    Path("f.yaml").write_text(FORMAT, "utf-8")
    Path("h.yaml").write_text(HARNESS, "utf-8")
    Path("c.yaml").write_text(SETTINGS, "utf-8")
    Path("s.yaml").write_text(Path("study.yaml").read_text("utf-8"), "utf-8")
    Path("p").mkdir()
    write_text(Path("p/a.txt"))
    write_rows(Path("p/b.jsonl"), [{"text": "the cat sat on a mat " * 9}] * 9)
    Path("p/z.txt.gz").write_bytes(gzip.compress(Path("p/a.txt").read_bytes()))
    try:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(questions()), "q.parquet")
    except ImportError:
        pass


def _chats() -> list[dict[str, Any]]:
    said = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    return [{"messages": said}] * 9


def _importance() -> list[Reader]:
    nu, seen = Path("record"), Path("seen")

    def sign() -> None:
        """As who wrote it would."""
        info = store.read_info(nu)
        for file in info["files"]:
            info["files"][file] = checksum(nu / file)
        info["adapter_config"] = None
        write_json(nu / store.MARKER, info)

    def values() -> Any:
        stored = store.load(nu)
        found = {**stored.importance.tensors()}
        found |= {f"{n}.{i}": t for n, both in stored.factors.items() for i, t in enumerate(both)}
        if not all(t.isfinite().all() for t in found.values()):
            raise AssertionError("not finite")
        return {k: t.tolist() for k, t in found.items()}

    dry = ["tune", *MODEL, "--task", "t.jsonl", "--output", "dry", "--importance", "seen"]
    return [
        *(Reader(nu / f, values, sign, 12) for f in (*store.ADAPTER_FILES, store.TENSORS)),
        Reader(seen / store.MARKER, lambda: command("inspect", "seen"), share=16),
        Reader(seen / store.MARKER, lambda: command(*dry, "--dry-run"), share=8),
    ]


def _adapter() -> list[Reader]:
    base = load("model")[0]

    def outputs() -> Any:
        model = load_adapter(copy.deepcopy(base), "tune").eval()
        with torch.no_grad():
            return model(input_ids=torch.arange(9)[None]).logits.sum().item()

    again = Command("tune").again("tune")
    scores = ["eval", *MODEL, "--task", "t.jsonl", "--task-rows", "1", "--adapter", "tune"]
    return [
        *(Reader(Path("tune") / f, outputs, share=12) for f in store.ADAPTER_FILES),
        Reader(Path("tune") / phases.TUNED, lambda: command(*scores), share=3),
        Reader(Path("tune") / phases.TUNED, _merged, share=3),
        Reader(Path("tune") / phases.TUNED, lambda: command(*again), share=8),
    ]  # fmt: skip


def _merged() -> Any:
    shutil.rmtree("merged", ignore_errors=True)
    return command("merge", "--adapter", "tune", "--output", "merged")


def _model() -> list[Reader]:
    def loaded() -> Any:
        model, words = load("model")
        encode(words, "the cat", "a test")
        with torch.no_grad():
            return model(input_ids=torch.arange(9)[None]).logits.sum().item()

    files = sorted(p for p in Path("model").iterdir() if p.is_file())
    return [Reader(p, loaded, share=8) for p in files]


def _data(words: Any) -> list[Reader]:
    def rows(where: str, **more: Any) -> Callable[[], Any]:
        words.chat_template = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        )
        return lambda: answer_rows(load_task(where, **more), words, 64, vocabulary=259).rows[:]

    def text(where: str) -> Callable[[], Any]:
        return lambda: blocks(Source.parse(where), words, 32, 4, 259).tolist()

    found = [Reader(Path(f), rows(f)) for f in ("t.jsonl", "t.csv", "chat.jsonl")]
    found += [Reader(Path("q.parquet"), rows("q.parquet"))] if Path("q.parquet").exists() else []
    found += [Reader(p, text(str(p))) for p in sorted(Path("p").iterdir())]
    return [*found, Reader(Path("f.yaml"), rows("t.jsonl", format="f.yaml"))]


def _settings() -> list[Reader]:
    return [
        Reader(Path("h.yaml"), lambda: read_task_file(Path("h.yaml")), share=14),
        Reader(Path("c.yaml"), lambda: parse(TuneSettings, ["--config", "c.yaml"], ""), share=14),
        Reader(Path("s.yaml"), lambda: read_study(Path("s.yaml")), share=14),
        Reader(Path("study.jsonl"), lambda: _pooled(Path("study.jsonl")), share=14),
    ]


def _pooled(path: Path) -> Any:
    results = read_results(path, mixed=True)
    return len(results.cells) if results.lines else 0


def _runs() -> list[Reader]:
    """A run that was cut short, resumed: from a damaged checkpoint, or an older one."""
    run = Command("tune")
    _interrupted(run)
    kept, work = Path("cut-kept"), Path("cut")
    last = work / "checkpoints" / "checkpoint-4"

    def again() -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(kept, work)

    def resumed() -> Any:
        command(*run.again("cut"))
        return run.found("cut")

    again()
    files = sorted(p for p in last.iterdir() if p.is_file())
    signs = {p: None if p.suffix == ".json" and "manifest" in p.name else _sealed for p in files}
    return [
        *(Reader(p, resumed, s and (lambda: seal(last)), 3, again) for p, s in signs.items()),
        Reader(work / "checkpoints" / "settings.json", resumed, share=6, before=again),
    ]


def _sealed() -> None:
    """Files of a checkpoint have checksums."""


def _interrupted(run: Command) -> None:
    clean_up, phases.clean_up = phases.clean_up, lambda settings: None
    try:
        command(*run.argv("cut-kept"))
    finally:
        phases.clean_up = clean_up
    shutil.rmtree("cut-kept/checkpoints/checkpoint-5")
    for path in [p for p in Path("cut-kept").iterdir() if p.is_file()]:
        path.unlink()
