"""Layers by block and target, as Fig. 7 lays them out."""

from __future__ import annotations

import re


def layer_grid(
    values: dict[str, float],
) -> tuple[list[str], list[int], list[list[float | None]]]:
    """Targets, block numbers, and the value of each target (row) in each block (column).

    A layer outside any numbered block counts as block 0; None where a block lacks the target.
    """
    cells: dict[tuple[str, int], float] = {}
    targets: dict[str, None] = {}
    for name, value in values.items():
        number = re.search(r"\.(\d+)\.", name)
        target = name.rsplit(".", 1)[-1]
        targets[target] = None
        cells[target, int(number[1]) if number else 0] = value
    blocks = sorted({block for _, block in cells})
    return (
        list(targets),
        blocks,
        [[cells.get((target, block)) for block in blocks] for target in targets],
    )
