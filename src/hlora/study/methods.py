"""The compared methods as data: what phase ν is, and what phase μ changes.

A method is the settings of `hlora record` and `hlora tune` that differ from a study's own. Labels
are the paper's; `source` says where a row comes from. Importance is dense, as the paper has it,
where a method does not say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        label: as tables print it.
        record: settings of phase ν that differ; None where the base model itself is scored.
        tune: settings of phase μ that differ; None where the general phase itself is scored.
        ones: replace the importance by Ω = 1.
        sweeps: whether a study's values of φ apply; else `tune` fixes φ, or the preset does.
        after_nu: the importance is gathered at the weights that the plain phase ν ended with.
        source: the paper, the baseline's paper, or this project.
    """

    label: str
    record: Mapping[str, Any] | None = field(default_factory=dict)
    tune: Mapping[str, Any] | None = field(default_factory=dict)
    ones: bool = False
    sweeps: bool = False
    after_nu: bool = False
    source: str = "the paper"


_PLAIN = {"phi": 0.0}
_FROM_BASE = {"phi": 0.0, "anchor": "base"}
_FISHER = {"kind": "fisher"}
_UNIFORM = {"layer_weights": "uniform"}

METHODS: dict[str, Method] = {
    "base": Method("Base", record=None),
    "nu": Method("after ν", tune=None, source="this project: what the general phase alone does"),
    "lora-mu": Method("LoRA(μ)", tune=_FROM_BASE),
    "lora-nu-mu": Method("LoRA(ν+μ)", tune=_PLAIN),
    "rslora-mu": Method("rsLoRA(μ)", tune={**_FROM_BASE, "rslora": True}, source="rsLoRA"),
    "rslora-nu-mu": Method(
        "rsLoRA(ν+μ)", record={"rslora": True}, tune={**_PLAIN, "rslora": True}
    ),
    # λ Σ F (s·BA)² from the base model: its importance folder holds an adapter with B = 0.
    "ewc": Method("EWC-LoRA", record=_FISHER, tune=_UNIFORM, sweeps=True, source="EWC-LoRA, lean"),
    # Its cost is what it is for: 20,000 sequences unless the study says fewer.
    "ewc-original": Method(
        "EWC-LoRA, as published", record={**_FISHER, "fisher_method": "original"}, tune=_UNIFORM,
        sweeps=True, source="EWC-LoRA",
    ),
    "ewc-nu": Method(
        "EWC-LoRA from θ^ν", record=_FISHER, tune=_UNIFORM, sweeps=True, after_nu=True,
        source="this project",
    ),
    "ewc-corpus": Method(
        "EWC-LoRA, corpus labels", record={**_FISHER, "fisher_labels": "corpus"}, tune=_UNIFORM,
        sweeps=True, source="EWC-LoRA, lean, with the labels of the original",
    ),
    "hlora": Method("HLoRA", sweeps=True, source="this project: normalized importance"),
    "hlora-factored": Method(
        "HLoRA, factored", record={"kind": "factored"}, sweeps=True, source="this project"
    ),
    "hlora-paper": Method(
        "HLoRA, as printed", record={"preset": "paper"}, tune={"preset": "paper"}
    ),
    "hlora-official": Method(
        "HLoRA, authors' code", record={"preset": "official"}, tune={"preset": "official"},
        source="season1blue/HLoRA",
    ),
    "l2": Method("L2 to θ^ν", tune=_UNIFORM, ones=True, sweeps=True, source="this project"),
    "hlora-no-layer": Method("HLoRA − layer", tune=_UNIFORM, sweeps=True),
    "hlora-paper-no-layer": Method(
        "HLoRA − layer, as printed", record={"preset": "paper"},
        tune={"preset": "paper", **_UNIFORM},
    ),
    "hlora-official-no-layer": Method(
        "HLoRA − layer, authors' code", record={"preset": "official"},
        tune={"preset": "official", **_UNIFORM}, source="season1blue/HLoRA",
    ),
}  # fmt: skip
"""HLoRA − layer − element is LoRA(ν+μ) (Table 2)."""
