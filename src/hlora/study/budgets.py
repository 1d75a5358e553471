"""What runs on a budget of forgetting told of themselves, and whether the budget held."""

from __future__ import annotations

from hlora.study.cells import Table
from hlora.study.rows import Results

_HEADINGS = [
    "run", "task", "seed", "budget", "predicted", "measured", "measured / predicted", "scaled by",
    "kept", "kept / budget",
]  # fmt: skip


def budgets(results: Results) -> Table | None:
    """A row for each run on a budget; None where there is none."""
    cells = [
        [row.label, task, str(line["run"]["seed"]), *_told(told)]
        for task in results.tasks
        for row in results.rows
        for line in results.of(row, task)
        if (told := line.get("budgeted"))
    ]
    return Table(_HEADINGS, cells) if cells else None


def _told(told: dict[str, float | None]) -> list[str]:
    budget, predicted, measured, error, share, kept = (
        told.get(k) for k in ("budget", "predicted", "measured", "measured_se", "share", "kept")
    )
    form = ".4f" if budget and budget >= 1e-3 else ".7f"
    spread = "" if error is None else f" ± {error:{form}}"
    return [
        _shown(budget, "g"), _shown(predicted, form), _shown(measured, form) + spread,
        _ratio(measured, predicted), _shown(share, ".3f"), _shown(kept, form),
        _ratio(kept, budget),
    ]  # fmt: skip


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _ratio(value: float | None, of: float | None) -> str:
    return _shown(value / of if value is not None and of else None, ".2f")
