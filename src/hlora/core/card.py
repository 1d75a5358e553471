"""The README.md of an adapter or importance folder: a model card, in place of PEFT's blank one.

It is made from what the folder's own notes say. Names in them come from others, so all are shown as
code, and of a path only the last part: where someone keeps their files is nobody's business.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PureWindowsPath
from typing import Any

from hlora.errors import visible
from hlora.files import size, write_whole

CARD = "README.md"
LIBRARIES = ("torch", "transformers", "peft", "accelerate")
URL = "https://arxiv.org/abs/2501.13669"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TRAINED = (
    "learning_rate", "epochs", "max_steps", "batch_size", "gradient_accumulation", "lora_rank",
    "lora_alpha", "lora_dropout", "rslora", "targets", "preset", "max_length", "block_size",
    "dtype", "load_in_4bit", "load_in_8bit", "seed",
)  # fmt: skip
"""Settings that say how it was trained; the others name places, or say nothing of the result."""
ADAPTER, IMPORTANCE, MERGED = "adapter", "importance", "merged"
_ANCHORS = {
    "nu": "the adapter recorded with it", "base": "the base model",
    "merged": "the base model, into which earlier adapters were merged",
}  # fmt: skip
_GATHERED = ("sequences", "block_size", "lora_rank", "targets", "dtype", "seed")
_MEASURED = ("block_size", "text_blocks", "dtype")


def write_card(folder: Path, text: str) -> None:
    write_whole(folder / CARD, text)


def versions() -> dict[str, str | None]:
    """Of hlora, Python and the libraries that train; None for one that is missing."""
    from hlora import __version__

    found: dict[str, str | None] = {"hlora": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def tuned(info: Mapping[str, Any]) -> str:
    """The card of a domain phase, from its `tune.json`."""
    data, log = info["data"], info["log"]
    mixed = f", mixed with general text ({_list(data['replay'])})" if data["replay"] else ""
    lines = [
        f"Trained on {code(data['task'])}, {data['rows']:,} rows{mixed}, for {info['steps']:,} "
        "optimizer steps."
    ]
    if log:
        lines.append(
            f"Loss while training, nats per token: {log[0]['loss']:.4g} at step {log[0]['step']}, "
            f"{log[-1]['loss']:.4g} at step {log[-1]['step']}."
        )
    parts = {
        "What it learned": lines,
        "What it was held by": _held(info),
        "What it forgot": _forgot(info["forgetting"], data["measured_on"]),
    }
    return _page(info, f"tuned on {code(data['task'])}", parts, _TRAINED)


def rewound(info: Mapping[str, Any]) -> str:
    """The card of an adapter that was scaled back, from its `rewind.json`."""
    chosen, whole = info["chosen"], next(p for p in info["points"] if p["share"] == 1)
    s = info["settings"]
    before, after = whole["measured"], chosen["measured"]
    lines = [
        f"Made from {_named(s['adapter'])} by scaling its change of the weights back, "
        f"{chosen['way']}, by {chosen['share']:.3f}."
    ]
    if chosen["nll"] is not None:
        lines.append(
            f"Loss on {_named(s['task'])}: {chosen['nll']:.3f} nats per answer, as trained "
            f"{whole['nll']:.3f}."
        )
    predicted = chosen["predicted"]
    forgot = [
        f"{give_or_take(**after)} nats per token, as trained {give_or_take(**before)}: the KL "
        f"divergence from the base model's predictions, measured on {_list(s['text'])}."
    ]
    if predicted is not None:
        forgot.append(f"Predicted by {_named(s['importance'])}: {predicted:.4g}.")
    held = [f"A budget of {s['forget_at_most']:g} nats per token, by scaling after training."]
    parts = {"What it is": lines, "What it was held by": held, "What it forgot": forgot}
    return _page(info, "scaled back to a budget of forgetting", parts, _MEASURED)


def merged(info: Mapping[str, Any]) -> str:
    """The card of a model with an adapter merged into it.

    Args:
        info: base_model, adapter, versions.
    """
    lines = [f"The weights of the base model with the adapter {_named(info['adapter'])} added."]
    return _page(info, "with an adapter merged into it", {"What it is": lines}, (), MERGED)


def recorded(info: Mapping[str, Any]) -> str:
    """The card of an importance folder, from its `importance.json`."""
    summary = info.get("summary") or {}
    own = summary.get("own_text")
    read = [f"{code(n)}, {count:,} rows" for n, count in (info.get("text") or {}).items()]
    read += [f"text that the model wrote itself, {own:,} rows"] if own else []
    stored = (info.get("recording") or {}).get("storage")
    form = info["kind"] + (f", stored as {stored}" if stored not in (None, "fp32") else "")
    bytes_ = sum(f["bytes"] for f in info["files"].values())
    task = info.get("task")
    read += [f"{code(task)}, {info['rows']:,} rows"] if task else []
    lines = [
        f"How much each weight matters for {code(task) if task else 'general text'}: importance of "
        f"the form {code(form)}, of {len(info['pairs'])} matrices, {size(bytes_)}.",
        f"From {'; '.join(read) or 'general text'}.",
    ]
    previous, gathered = info.get("previous"), "own_text" in summary
    if gathered:
        at = f"the adapter of {_named(previous)}" if previous else "the base model"
        lines.append(f"Gathered without training, at {at}.")
    else:
        lines.append(
            f"Gathered while the adapter beside it was trained on {'it' if task else 'that text'}. "
            "A domain starts from this adapter."
        )
        lines += [f"It adds to {_named(previous)}."] if previous else []
    shown = _GATHERED if gathered else _TRAINED
    parts = {"What it is": lines} | ({"What it was held by": _held(info)} if task else {})
    return _page(info, "importance of its weights", parts, shown, IMPORTANCE)


def _page(
    info: Mapping[str, Any], what: str, parts: dict[str, list[str]], shown: Iterable[str],
    what_for: str = ADAPTER,
) -> str:  # fmt: skip
    base = info["base_model"]
    name = str(base["name"] or "")
    on_hub = hub_name(name)
    tags = ["hlora", "lora", "continual-learning"]
    library = "transformers" if what_for == MERGED else "peft"
    front: dict[str, Any] = {"library_name": library, "tags": tags}
    if what_for == IMPORTANCE:
        tags.append("importance")
    if on_hub:
        front = {"base_model": on_hub, **front, "pipeline_tag": "text-generation"}
    # JSON is YAML.
    lines = ["---", *(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in front.items()), "---"]
    lines += ["", f"# {_named(name) if name else 'A LoRA adapter'}, {what}", ""]
    revision = base.get("revision")
    lines += [
        f"Base model: {_named(name) if name else 'unnamed'}"
        + (f" at revision {code(str(revision))}" if revision else "")
        + ("." if on_hub or not name else ", a local model.")
    ]
    for heading, said in parts.items():
        lines += ["", f"## {heading}", "", *"\n\n".join(said).split("\n")]
    lines += ["", "## How to load it", "", *_loading(on_hub, what_for)]
    noted = info.get("settings") or {}
    settings = [
        f"- {k.replace('_', ' ')}: {code(_value(noted[k]))}" for k in shown if _said(noted, k)
    ]
    lines += ["", "## Settings", "", *settings] if settings else []
    made = [f"{k} {code(str(v))}" for k, v in (info.get("versions") or versions()).items() if v]
    lines += ["", "## Versions", "", ", ".join(made) + "."]
    lines += ["", f"Made with hlora ([the method]({URL}))."]
    return "\n".join(lines) + "\n"


def _loading(base: str | None, what_for: str) -> list[str]:
    base, here = base or "BASE_MODEL", "THIS_FOLDER_OR_HUB_NAME"
    load = "model = AutoModelForCausalLM.from_pretrained"
    start = ["```python", "from transformers import AutoModelForCausalLM", ""]
    if what_for == MERGED:
        return [*start, f'{load}("{here}")', "```"]
    lines = [
        start[0], "from peft import PeftModel", *start[1:], f'{load}("{base}")',
        f'model = PeftModel.from_pretrained(model, "{here}")', "```",
    ]  # fmt: skip
    if what_for == ADAPTER:
        return lines
    command = f"hlora tune --model {base} --importance {here} --task FILE --output DIR"
    return ["```bash", command, "```", "", "The adapter alone:", "", *lines]


def _held(info: Mapping[str, Any]) -> list[str]:
    s, lines = info["settings"], []
    budget = s["forget_at_most"]
    for of in info["held"]:
        how = f"φ {of['penalty']['phi']:g}"
        if budget:
            how, budget = f"a budget of {budget:g} nats per token, which steers φ", None
        lines.append(
            f"{of['kind'].capitalize()} importance, {_named(of['importance'])}"
            f", with {how}; it pulls towards {_ANCHORS[of['anchor']]}."
        )
    if s["kl"]:
        lines.append(
            f"The KL divergence from the base model on {_list(s['kl'])}, with weight "
            f"{s['kl_weight']:g}."
        )
    return lines or ["Nothing: this is plain LoRA."]


def _forgot(found: Mapping[str, Any] | None, on: list[str]) -> list[str]:
    if not found:
        return ["Not measured: `hlora eval --adapter` does."]
    if found["measured"] is None:
        return [f"Not known: its predictions on {_list(on)} are not finite."]
    measured = give_or_take(found["measured"], found["measured_se"])
    scaled = f"; scaled by {found['share']:.3f} to {give_or_take(found['kept'])}"
    return [
        f"Predicted {give_or_take(found['predicted'])}, measured {measured}"
        f"{scaled if found['share'] < 1 else ''}: nats per token of KL divergence from the base "
        f"model's predictions, on {_list(on)}."
    ]


def give_or_take(nats: float | None, se: float | None = None, form: str = ".4g .2g") -> str:
    """A figure with its error, where there is one: a single row of text has none.

    Args:
        form: how the two are written.
    """
    of_nats, of_se = form.split()
    if nats is None:
        return "no finite number"
    return f"{nats:{of_nats}}" + ("" if se is None or math.isnan(se) else f" ± {se:{of_se}}")


def hub_name(name: str) -> str | None:
    """`owner/name` if a base model's name can be one on the hub, else None."""
    bare = name.partition("@")[0]
    return bare if _HUB_NAME.fullmatch(bare) and not Path(bare).exists() else None


def _named(where: Any) -> str:
    """A hub name, or the last part of a path."""
    where = str(where)
    if hub_name(where) or not where:
        return code(where)
    return code(PureWindowsPath(where).name or Path(where).name or where)


def _list(names: Iterable[str]) -> str:
    return ", ".join(_named(n) for n in names)


def _said(settings: Mapping[str, Any], key: str) -> bool:
    value = settings.get(key)
    if key == "epochs" and settings.get("max_steps"):
        return False
    return value not in (None, "") and value is not False and (key == "seed" or value != 0)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def code(text: str) -> str:
    """Text as an inline code span, whatever is in it."""
    text = visible(text).replace("\n", "\\n")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}" if text else "(unnamed)"
