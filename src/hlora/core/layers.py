"""Eq. 15: how much each layer (target matrix) counts in R, and layers as Fig. 7 lays them out."""

from __future__ import annotations

import math
import re

LAYER_WEIGHTS = ("softmax", "normalized", "uniform")


def layer_weights(
    norms: dict[str, float], how: str = "softmax", *, scale: float = 1.0, apart: bool = False
) -> dict[str, float]:
    """The weight of each layer.

    Args:
        norms: ‖Ω_l‖₂ by layer name.
        how: `softmax` of the norms (Eq. 15), `normalized` (norm over the sum of norms) or
            `uniform` (the paper's "− layer" ablation).
        scale: multiplies the norms before the softmax; the authors' code has 1e-8.
        apart: over each target (q_proj, v_proj) on its own, as in the authors' code. The weights
            then add up to the number of targets, else to one.
    """
    targets: dict[str, list[str]] = {}
    for name in norms:
        targets.setdefault(name.rsplit(".", 1)[-1] if apart else "", []).append(name)
    weights: dict[str, float] = {}
    for names in targets.values():
        values = [norms[n] for n in names]
        if how == "softmax":
            top = max(values)
            raw = [math.exp(scale * (v - top)) for v in values]
        elif how == "normalized" and sum(values) > 0:
            raw = values
        else:
            raw = [1.0] * len(values)
        total = sum(raw)
        weights |= {n: w / total for n, w in zip(names, raw, strict=True)}
    return {n: weights[n] for n in norms}


def effective_number(weights: dict[str, float]) -> float:
    """exp(entropy): 1 when one layer has all the weight, the number of layers when all share."""
    total = sum(weights.values())
    return math.exp(-sum(w / total * math.log(w / total) for w in weights.values() if w > 0))


def layer_grid(values: dict[str, float]) -> tuple[list[str], list[int], list[list[float | None]]]:
    """Layers by block and target, as Fig. 7 draws them.

    Targets, block numbers, and the value of each target (row) in each block (column). A layer
    outside any numbered block counts as block 0; None where a block lacks the target. Where it has
    several, the experts of a mixture, the value is √Σ of their squares: norms are those of all.
    """
    cells: dict[tuple[str, int], float] = {}
    targets: dict[str, None] = {}
    for name, value in values.items():
        number = re.search(r"\.(\d+)\.", name)
        target = name.rsplit(".", 1)[-1]
        targets[target] = None
        at = target, int(number[1]) if number else 0
        cells[at] = math.hypot(cells.get(at, 0.0), value)
    blocks = sorted({block for _, block in cells})
    return (
        list(targets),
        blocks,
        [[cells.get((target, block)) for block in blocks] for target in targets],
    )


def unreached(norms: dict[str, float]) -> list[str]:
    """The parts of a model that the general text never reached: every matrix there has norm 0.

    Each by the shortest name that no other matrix shares, such as `model.vision_tower`.
    """
    reached = {n[:i] for n, norm in norms.items() if norm for i in _ends(n)}
    zero = [n for n, norm in norms.items() if not norm]
    return list(dict.fromkeys(next(n[:i] for i in _ends(n) if n[:i] not in reached) for n in zero))


def _ends(name: str) -> list[int]:
    """Where the parts of a dotted name end."""
    return [i for i, c in enumerate(name) if c == "."] + [len(name)]
