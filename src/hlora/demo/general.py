"""General text that every Python has: its documentation, its docstrings, its source.

Three kinds. The first two are recorded in phase ν; `code` is kept unseen, the one least like them.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from pathlib import Path

from hlora.files import write_whole

SEEN = ("docs", "docstrings")
UNSEEN = "code"
TEST_SHARE = 0.25
CHARACTERS = 400_000
"""At most so much of each file: the demo reads about half of it."""


def write_general(folder: Path) -> None:
    """Write `KIND.train.txt` for the seen kinds and `KIND.test.txt` for all.

    A document (a topic, a module) is on one side only, and so is a paragraph: topics quote each
    other at length.
    """
    for kind, documents in _documents().items():
        names = sorted(documents, key=_shuffled)
        test = [documents[n] for n in names if _shuffled(n) < TEST_SHARE]
        if kind in SEEN:
            train = [documents[n] for n in names if _shuffled(n) >= TEST_SHARE]
            _write(folder / f"{kind}.train.txt", train)
            known = {p for text in train for p in _paragraphs(text)}
            test = ["\n\n".join(p for p in _paragraphs(t) if p not in known) for t in test]
        _write(folder / f"{kind}.test.txt", test)


def _paragraphs(text: str) -> list[str]:
    return [p for p in text.strip().split("\n\n") if p.strip()]


def _write(path: Path, texts: list[str]) -> None:
    write_whole(path, "\n\n\n".join(t.strip() for t in texts if t.strip())[:CHARACTERS])


def _documents() -> dict[str, dict[str, str]]:
    """The documents of each kind by name."""
    from pydoc_data.topics import topics

    docstrings, code = {}, {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            source = path.read_text("utf-8")
            tree = ast.parse(source)
        except (OSError, UnicodeDecodeError, SyntaxError):
            continue
        docstrings[path.stem] = "\n\n".join(
            text
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and (text := ast.get_docstring(node))
        )
        code[path.stem] = ast.unparse(_without_docstrings(tree))
    return {"docs": dict(topics), "docstrings": docstrings, "code": code}


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
            ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _shuffled(name: str) -> float:
    """A number in [0, 1) that is the same on every machine."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
