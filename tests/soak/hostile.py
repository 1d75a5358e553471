"""Files and names that mean harm: nothing runs, nothing goes on for ever, one sentence says why."""

from __future__ import annotations

import json
import pickle
import shutil
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hlora.errors import HloraError
from hlora.files import seal
from tests.soak.mutations import Slow, bounded, command
from tests.soak.place import MODEL, Command
from tests.soak.readers import HARNESS
from tests.tiny import questions, write_rows

CANARY = Path("canary")
RUNS = f"cycler.__init__.__globals__.os.system('touch {CANARY}')"
FOR_EVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SCREEN = "\x1b[31m[/red]<script>x</script>](http://x)$\\frac$\x07"

Argv = list[str]


class Harm:
    """Unpickled, it runs a command."""

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {CANARY}",)


def cases() -> Iterator[tuple[str, Argv]]:
    """What each is, and the command that meets it."""
    yield from _harness()
    yield from _models()
    yield from _adapters()
    yield from _checkpoints()
    yield from _texts()


def _scored(*argv: str, model: str = "model") -> Argv:
    given = ["eval", "--model", model, *MODEL[2:], "--text-blocks", "1", "--task-rows", "1"]
    return [*given, "--block-size", "32", *argv]


def _harness() -> Iterator[tuple[str, Argv]]:
    for i, (field, value) in enumerate(
        [
            ("doc_to_text", "{{" + RUNS + "}}"),
            ("doc_to_target", "{{" + RUNS + "}}"),
            ("doc_to_choice", "{{" + RUNS + "}}"),
            ("doc_to_text", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
            ("doc_to_text", "{{ self.__init__.__globals__ }}"),
            ("doc_to_text", "{{ 'a' * 10**9 }}"),
            ("doc_to_text", FOR_EVER),
            ("doc_to_text", "!function utils.f"),
            ("process_docs", "!function utils.f"),
            ("metric_list", [{"metric": "folder"}]),
            ("dataset_path", "folder"),
            ("custom_dataset", "os.system"),
            ("class", "os.system"),
            ("include", "h.yaml"),
        ]
    ):
        lines = [ln for ln in HARNESS.splitlines() if not ln.startswith(field)]
        shown = value if str(value).startswith("!") else json.dumps(value)
        Path(f"evil{i}.yaml").write_text("\n".join([*lines, f"{field}: {shown}"]), "utf-8")
        yield f"lm-eval task file, {field}", _scored("--lm-eval", f"evil{i}.yaml")
    Path("folder").mkdir(exist_ok=True)
    for name in ("folder.py", "__init__.py", "utils.py"):
        Path("folder", name).write_text(f"import os; os.system('touch {CANARY}')", "utf-8")
    Path("utils.py").write_text(f"import os; os.system('touch {CANARY}')", "utf-8")
    Path("fmt.yaml").write_text("prompt: '" + FOR_EVER + "'\nchoices: choices\nanswer: 0\n")
    yield "task format, endless", _scored("--task", "t.jsonl", "--task-format", "fmt.yaml")


def _models() -> Iterator[tuple[str, Argv]]:
    def copy(name: str, file: str = "config.json", **values: Any) -> Argv:
        folder = Path(shutil.copytree("model", name, dirs_exist_ok=True))
        (folder / file).write_text(
            json.dumps({**json.loads((folder / file).read_text()), **values}), "utf-8"
        )
        (folder / "evil.py").write_text(f"import os; os.system('touch {CANARY}')\nclass A: pass\n")
        return _scored("--text", "a.txt", model=name)

    yield "config.json, code of its own", copy(
        "e1", auto_map=dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.A"),
        model_type="evil",
    )  # fmt: skip
    yield "config.json, a kernel of the hub", copy("e2", attn_implementation="owner/kernel")
    yield "config.json, experts of the hub", copy("e3", _experts_implementation="owner/kernel")
    yield "tokenizer_config.json, code of its own", copy(
        "e4", "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.A", "evil.A"]},
        tokenizer_class="A",
    )  # fmt: skip
    yield "config.json, escape sequences", copy("e5", model_type=SCREEN)
    folder = Path(shutil.copytree("model", "e6", dirs_exist_ok=True))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    yield "weights that are a pickle", _scored("--text", "a.txt", model="e6")
    folder = Path(shutil.copytree("model", "e7", dirs_exist_ok=True))
    (folder / "model.safetensors").write_bytes(pickle.dumps(Harm()))
    yield "a pickle named safetensors", _scored("--text", "a.txt", model="e7")
    for name, template in (("e8", "{{" + RUNS + "}}"), ("e9", FOR_EVER)):
        copy(name, "tokenizer_config.json", chat_template=template)
        Path(name, "chat_template.jinja").unlink(missing_ok=True)
        yield f"chat template of a model ({name})", _scored("--task", "chat.jsonl", model=name)


def _adapters() -> Iterator[tuple[str, Argv]]:
    for name, values in {
        "a1": {"target_modules": "((((\\w+)+)+)+)+!"},
        "a2": {"auto_mapping": {"base_model_class": "evil", "parent_library": "folder"}},
        "a3": {"megatron_config": {"a": 1}, "megatron_core": "folder"},
        "a4": {"base_model_name_or_path": SCREEN},
        "a5": {"init_lora_weights": "pissa_niter_1000000000"},
    }.items():
        path = Path(shutil.copytree("tune", name, dirs_exist_ok=True)) / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}), "utf-8")
        yield f"adapter_config.json ({name})", _scored("--text", "a.txt", "--adapter", name)
    folder = Path(shutil.copytree("tune", "a6", dirs_exist_ok=True))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Harm()))
    yield "an adapter that is a pickle", _scored("--text", "a.txt", "--adapter", "a6")


def _checkpoints() -> Iterator[tuple[str, Argv]]:
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        output = Path(f"ck-{file}")
        shutil.copytree("cut-kept", output, dirs_exist_ok=True)
        last = output / "checkpoints" / "checkpoint-4"
        for save in (
            lambda p: p.write_bytes(pickle.dumps(Harm())),
            lambda p: torch.save(Harm(), p),
        ):
            save(last / file)
            seal(last)
        yield f"checkpoint, {file} that runs code", Command("tune").again(str(output))


def _texts() -> Iterator[tuple[str, Argv]]:
    write_rows(Path("odd.jsonl"), [{**q, "prompt": SCREEN} for q in questions(4)])
    odd = Path("a.txt").rename("odd [" + "red].txt")
    shutil.copy(odd, "a.txt")
    yield "names and texts with escapes", _scored("--task", "odd.jsonl", "--text", str(odd))
    Path("deep.jsonl").write_text("[" * 100_000 + "\n")
    yield "JSON nested deep", _scored("--task", "deep.jsonl")
    Path("deep.yaml").write_text("a: " + "[" * 100_000)
    yield "YAML nested deep", ["tune", "--config", "deep.yaml"]
    Path("laugh.yaml").write_text("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodel: *c\n")
    yield "YAML of a billion laughs", ["tune", "--config", "laugh.yaml"]
    Path("tag.yaml").write_text(f"model: !!python/object/apply:os.system ['touch {CANARY}']\n")
    yield "YAML with a Python tag", ["tune", "--config", "tag.yaml"]
    yield "study with a Python tag", ["study", "tag.yaml"]
    token = "hf_" + "x" * 30
    yield "a hub token", [
        "tune", *MODEL, "--task", "t.jsonl", "--max-steps", "1", "--output", "secret",
        f"--training.hub_token={token}",
    ]  # fmt: skip


def try_all() -> Counter:
    """Each case once."""
    found: Counter = Counter()
    for what, argv in cases():
        CANARY.unlink(missing_ok=True)
        try:
            with bounded():
                said = command(*argv)
            outcome = "read"
        except HloraError as error:
            said, outcome = str(error), "refused"
        except Slow:
            said, outcome = "", "ENDLESS"
        except BaseException:
            said, outcome = traceback.format_exc(), "TRACEBACK"
        if CANARY.exists():
            outcome = "CODE RAN"
        elif "\x1b" in said or "\x07" in said:
            outcome = "ESCAPES WERE PRINTED"
        elif Path("secret").exists() and _told("hf_xxx", "secret"):
            outcome = "A SECRET WAS WRITTEN"
        if outcome.isupper():
            print(f"{what}: {outcome}\n{said[-1500:]}", flush=True)
        found[f"{what}: {outcome}"] += 1
    return found


def _told(secret: str, folder: str) -> bool:
    return any(secret.encode() in p.read_bytes() for p in Path(folder).rglob("*") if p.is_file())
