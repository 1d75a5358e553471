"""What the site has that a folder of Markdown does not; mkdocs calls these (see mkdocs.yml)."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

from hlora.cli.main import COMMANDS
from hlora.run.build import default_of

NOTEBOOK, SETTINGS = "quickstart.ipynb", "settings.md"
EVERY_SETTING = "<!-- every setting -->"
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """The notebook as a page, with what its cells printed when they last ran."""
    notebook = files.get_file_from_path(NOTEBOOK)
    files.remove(notebook)
    content = as_markdown(json.loads(Path(notebook.abs_src_path).read_text("utf-8")))
    page = PurePosixPath(NOTEBOOK).with_suffix(".md")
    files.append(File.generated(config, str(page), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    if page.file.src_uri == SETTINGS:
        markdown = markdown.replace(EVERY_SETTING, every_setting())
    markdown = markdown.replace(f"({NOTEBOOK})", f"({PurePosixPath(NOTEBOOK).stem}.md)")
    return _LINK.sub(lambda found: outside(found[1], found[2], config.repo_url), markdown)


def outside(text: str, target: str, repository: str | None) -> str:
    """A link to a file beside docs/: to the repository where one is set, else its name."""
    path = target.removeprefix("../")
    if repository:
        return f"[{text}]({repository.rstrip('/')}/blob/main/{path})"
    return text if path.rstrip("/") in text else f"{text} (`{path}`)"


def as_markdown(notebook: dict[str, Any]) -> str:
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        printed = "".join("".join(o["text"]) for o in cell.get("outputs", []))
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts)


def every_setting() -> str:
    """The help texts of `hlora.run.settings`, a table for each command."""
    parts = []
    for name, (cls, _) in COMMANDS.items():
        parts += [f"## hlora {name}", "", (cls.__doc__ or "").strip(), "", "| | | default |"]
        parts.append("|---|---|---|")
        for f in sorted(fields(cls), key=lambda f: not f.metadata["required"]):
            flag = f.name if f.metadata["positional"] else "--" + f.name.replace("_", "-")
            default = default_of(f)
            shown = "*required*" if f.metadata["required"] else _shown(default)
            choices = " · ".join(f"`{c}`" for c in f.metadata["choices"])
            text = re.sub(r"([|<\[])", r"\\\1", f.metadata["help"])  # as it stands
            parts.append(f"| `{flag}` | {text}{f' ({choices})' if choices else ''} | {shown} |")
        parts.append("")
    return "\n".join(parts)


def _shown(default: Any) -> str:
    if default in (None, [], {}, False):
        return ""
    return f"`{' '.join(default) if isinstance(default, list) else default}`"
