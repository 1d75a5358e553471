"""The rooms of the package, and the one direction in which they may import each other."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hlora
from hlora.cli.main import COMMANDS
from hlora.core.kinds import kind_named
from hlora.study.methods import METHODS

TESTS = Path(__file__).parent
SOURCE = Path(hlora.__file__).parent
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "core": {"errors", "files"},
    "hf": {"errors", "files", "core"},
    "data": {"errors", "files"},
    "run": {"errors", "files", "core", "hf", "data"},
    "study": {"errors", "files", "core", "hf", "data", "run"},
    "cli": {"errors", "files", "core", "hf", "data", "run", "study"},
}
"""Every room, and the rooms below it. `hlora` itself (the version) is open to all."""


def imports(path: Path) -> set[str]:
    """The modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room they reach"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]  # KINDS and the like: "hlora.core.x:Class"
            if name.startswith("hlora.") and "/" not in name and " " not in name:
                found.add(name)
    return found


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "hlora" and len(parts) > 1 and parts[1] in MAY_IMPORT else None


FILES = [p for p in sorted(SOURCE.rglob("*.py")) if p.parent != SOURCE]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    here = path.relative_to(SOURCE).parts[0]
    reached = {room(m) for m in imports(path)} - {None, here}
    assert reached <= MAY_IMPORT[here], f"{path} reaches {reached - MAY_IMPORT[here]}"


def test_every_folder_is_a_room_and_nothing_lies_flat():
    folders = {p.parent.relative_to(SOURCE).parts[0] for p in FILES}
    assert folders == set(MAY_IMPORT) - {"errors", "files"}
    flat = {p.stem for p in SOURCE.glob("*.py")}
    assert flat == {"__init__", "__main__", "errors", "files"}


def test_peft_s_insides_are_known_in_one_file():
    """The adapter's tuner layers; `get_peft_model` and `PeftModel` are its public interface."""
    for path in FILES:
        inside = {m for m in imports(path) if m.startswith("peft.") and m.count(".") > 1}
        assert not inside or path == SOURCE / "hf" / "peft.py"


def test_the_drawing_names_every_module():
    """Those of the commands are one each: `hlora COMMAND` is cli/COMMAND.py."""
    drawing = (TESTS.parent / "docs" / "architecture.md").read_text("utf-8")
    named = set(re.findall(r"`(?:\w+/)?(\w+)(?:\.py)?`", drawing))
    modules = {p.stem for p in FILES if p.stem != "__init__"}
    assert modules - COMMANDS.keys() <= named
    files = set(re.findall(r"`(?:\w+/)?(\w+)\.py`", drawing))
    assert files <= {p.stem for p in [*FILES, *SOURCE.glob("*.py"), *TESTS.glob("*.py")]}


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_core_needs_torch_and_safetensors_only():
    modules = [
        "hlora." + ".".join(p.relative_to(SOURCE).with_suffix("").parts)
        for p in FILES
        if p.relative_to(SOURCE).parts[0] == "core" and p.stem not in ("__init__", "fused")
    ]
    code = "import sys, importlib\n"
    code += "for name in ('transformers', 'peft', 'datasets', 'accelerate', 'jinja2', 'yaml'):\n"
    code += "    sys.modules[name] = None\n"
    code += f"for name in {modules!r}: importlib.import_module(name)\n"
    code += "from hlora.core.kinds import KINDS, kind_named\n"
    code += "print(sorted(kind_named(k).kind for k in KINDS))"
    assert "factored" in run(code)


def test_importing_hlora_imports_nothing_heavy_and_dir_names_all():
    code = "import sys, hlora\n"
    code += "print([m for m in ('torch', 'transformers', 'peft', 'numpy') if m in sys.modules])\n"
    code += "print(set(hlora.__all__) <= set(dir(hlora)))"
    assert run(code).split("\n")[:2] == ["[]", "True"]


@pytest.mark.parametrize(
    ("command", "unused"),
    [
        ("report", ["torch", "transformers", "peft", "datasets"]),
        ("study", ["torch", "transformers", "peft", "datasets", "matplotlib"]),
        ("inspect", ["transformers", "peft", "datasets", "matplotlib"]),
    ],
)
def test_a_command_imports_what_it_uses(command, unused):
    code = f"import sys, hlora.cli.main, hlora.cli.{command}\n"
    assert run(code + f"print([m for m in {unused!r} if m in sys.modules])").strip() == "[]"


def test_a_report_is_made_without_torch(tmp_path):
    lines = SOURCE.parents[1] / "results" / "forgetting.jsonl"
    code = "import sys\nfrom hlora.cli.main import main\n"
    code += f"main(['report', {str(lines)!r}, '--mixed', '--output', {str(tmp_path)!r}])\n"
    assert run(code + "print('torch' in sys.modules)").splitlines()[-1] == "False"


def test_methods_know_what_starts_at_the_base():
    for name, of in METHODS.items():
        kind = (of.record or {}).get("kind", "dense")
        at_base = of.record is None or not (of.after_nu or kind_named(kind).trained)
        assert of.from_base == at_base, name


def test_every_public_name_is_there():
    for name in hlora.__all__:
        assert getattr(hlora, name) is not None
