"""The README as a new user meets it: the wheel in an environment of its own, under every trainer.

python -m tests.fresh FOLDER [KIND ...]    the environment in FOLDER is made once, and kept
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch

from tests.end_to_end.test_package import build, wheel_of
from tests.fresh.trainers import KINDS
from tests.test_trl import CHAT
from tests.tiny import tokenizer, write_model

ROOT = Path(__file__).parents[2]
ASKED = ("torch", "transformers", "peft", "trl", "accelerate", "tensorboard", "wandb", "trackio")


def environment(folder: Path) -> Path:
    """The Python of a new environment with the wheel of this checkout, and the reporters."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "venv", with_pip=True)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "source")
        shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info"))
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, source)
        build("wheel", source, name)
        wheel = wheel_of(Path(name))
        pip = [python, "-m", "pip", "install", "--quiet"]
        same_torch = f"torch=={torch.__version__}"  # else a CUDA build may come along
        subprocess.run([*pip, same_torch, f"{wheel}[trl,data]", *ASKED[5:]], check=True)
        subprocess.run([*pip, "--no-deps", "--force-reinstall", wheel], check=True)
    return python


def prepare(folder: Path, python: Path) -> None:
    """A tiny model named BASE, and its importance, by the README's first command."""
    if not (folder / "BASE").exists():
        write_model(folder / "BASE")
        words = tokenizer()
        words.chat_template = CHAT
        words.save_pretrained(folder / "BASE")
    shutil.rmtree(folder / "base", ignore_errors=True)
    command = [python.parent / "hlora", "record", "--model", "BASE", "--output", "base"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def main(folder: Path, kinds: list[str]) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    python = environment(folder)
    prepare(folder, python)
    readme = (ROOT / "README.md").read_text("utf-8")
    snippets = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    asked = f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {ASKED}))"
    print(subprocess.check_output([python, "-c", asked], text=True))
    failed = 0
    for kind in kinds or KINDS:
        for number, snippet in enumerate(snippets, 1):
            with tempfile.TemporaryDirectory(dir=folder) as name:
                (Path(name) / "snippet.py").write_text(snippet, "utf-8")
                for linked in ("BASE", "base"):
                    (Path(name) / linked).symlink_to(folder / linked)
                script = Path(__file__).with_name("trainers.py")
                done = subprocess.run(
                    [python, script, kind, "snippet.py"], cwd=name, check=False, text=True,
                    capture_output=True,
                )  # fmt: skip
            last = (done.stdout.strip() or "{}").splitlines()[-1]
            good = done.returncode == 0 and all(json.loads(last).values())
            failed += not good
            print(f"{kind}, snippet {number}: {last if done.returncode == 0 else done.stderr}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
