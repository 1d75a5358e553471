"""General text that ships with Python: its documentation, its docstrings, its source.

As text for `--text`: `python-docs`, `python-docstrings` and `python-code`, `@train` or `@test`.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from functools import lru_cache
from pathlib import Path

PREFIX = "python-"
KINDS = ("docs", "docstrings", "code")
SPLITS = ("train", "test")
TEST_SHARE = 0.25
CHARACTERS = 400_000
"""At most so much of each split, about 100,000 tokens."""


def is_name(where: str) -> bool:
    """Whether this names such text, and not a data set on the hub."""
    return where.startswith(PREFIX) and "/" not in where


@lru_cache
def python_text(kind: str, split: str) -> str:
    """One split of one kind.

    A document (a topic, a module) is on one side only. In prose so is a paragraph, for topics
    quote each other at length.
    """
    documents = _documents(kind)
    names = sorted(documents, key=_shuffled)
    train = [documents[n] for n in names if _shuffled(n) >= TEST_SHARE]
    if split == "train":
        return _joined(train)
    test = [documents[n] for n in names if _shuffled(n) < TEST_SHARE]
    if kind != "code":
        known = {p for text in train for p in _paragraphs(text)}
        test = ["\n\n".join(p for p in _paragraphs(t) if p not in known) for t in test]
    return _joined(test)


def _joined(texts: list[str]) -> str:
    return "\n\n\n".join(t.strip() for t in texts if t.strip())[:CHARACTERS]


def _paragraphs(text: str) -> list[str]:
    return [p for p in text.strip().split("\n\n") if p.strip()]


def _documents(kind: str) -> dict[str, str]:
    """The documents of a kind by name."""
    if kind == "docs":
        from pydoc_data.topics import topics

        return dict(topics)
    found = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, SyntaxError):
            continue
        found[path.stem] = _docstrings(tree) if kind == "docstrings" else _code(tree)
    return found


def _docstrings(tree: ast.Module) -> str:
    return "\n\n".join(
        text
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and (text := ast.get_docstring(node))
    )


def _code(tree: ast.Module) -> str:
    """The source without its docstrings and comments."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
            ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _shuffled(name: str) -> float:
    """A number in [0, 1) that is the same on every machine."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
