"""The compared methods as data (`methods.yaml`): what phase ν is, and what phase μ changes.

A method is the settings of `hlora record` and `hlora tune` that differ from a study's own. Labels
are the paper's; `source` says where a row comes from. Importance is dense, as the paper has it,
where a method does not say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hlora.data.parse import packaged

_ALONG_TRAINING = (None, "dense", "factored", "entries")
"""The `trained` kinds, by name: their classes would bring torch into every report."""


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        record: settings of phase ν that differ; None where there is none: plain LoRA from the base.
        tune: settings of phase μ that differ; None where there is none, and what phase ν ended
            with is scored, or the base model.
        ones: replace the importance by Ω = 1.
        sweeps: whether a study's values of φ apply; else `tune` fixes φ, or the preset does.
        swept: the setting of `hlora tune` that takes them; of a mapping, `setting.name`.
        keeps: the settings of `hlora tune` that take the general text, where phase μ needs it too.
        rewinds: in place of a phase μ, the adapter of this method, its change times φ.
        at: the strength of the method that is rewound, where it sweeps.
        back_to_nu: the change is that from θ^ν, not from the base model: φ is the share of an
            average of the two ends.
        after_nu: the importance is gathered at the weights that the plain phase ν ended with.
        source: the paper, the baseline's paper, or this project.
    """

    label: str
    record: Mapping[str, Any] | None = field(default_factory=dict)
    tune: Mapping[str, Any] | None = field(default_factory=dict)
    ones: bool = False
    sweeps: bool = False
    swept: str = "phi"
    keeps: str = ""
    rewinds: str = ""
    at: float | None = None
    back_to_nu: bool = False
    after_nu: bool = False
    source: str = "the paper"

    @property
    def trains(self) -> bool:
        """False of the base model alone."""
        return self.record is not None or self.tune is not None

    @property
    def from_base(self) -> bool:
        """Whether phase μ starts at the base model, not at what a general phase ended with."""
        if self.record is None:
            return True
        return not self.after_nu and self.record.get("kind") not in _ALONG_TRAINING


METHODS = {name: Method(**values) for name, values in packaged("study", "methods.yaml").items()}
