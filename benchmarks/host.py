"""What an addition gives the host to do in a step: operations to queue, and values to wait for.

    python -m benchmarks.host

On a GPU the small tensor work around the kernels costs its launches, whatever the size of the
matrices. So this counts the operations of torch (views apart) in a model with the depth of
Llama-3.2-3B and next to nothing in its matrices, beside those of the LoRA step itself. They are the
same on every machine. Each of the groups of matrices of one shape adds the launches of
`hlora.core.ops.fused` to those of dense importance; here its work is left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cost
from benchmarks.shapes import NARROW
from benchmarks.step import Bench, additions
from hlora.core import ops
from hlora.core.logcodes import LogCodes
from hlora.core.lowrank import LowRank

WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
"""Operations whose result the host reads, for which it waits until the device has caught up."""


class Operations(TorchDispatchMode):
    """Counts what torch is asked for.

    Attributes:
        queued: operations that work on a device; views are free.
        waits: those whose result the host reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queued = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.waits.append(name)
        elif not func.is_view and name not in ("detach", "empty", "empty_like", "unbind"):
            self.queued += 1
        return result


def counted(run: Callable[[], None]) -> Operations:
    with Operations() as operations:
        run()
    return operations


def _no_kernels() -> contextlib.AbstractContextManager[Any]:
    """What `hlora.core.ops` does with (m, n) matrices, left out."""

    def weigh(
        Omega: Tensor | LogCodes, change: LowRank, left: Tensor, right: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return left.new_empty(len(left)), torch.empty_like(left), torch.empty_like(right)

    return patch.multiple(ops, accumulate=lambda *_: None, weigh=weigh)


def rows() -> list[dict[str, Any]]:
    """The LoRA step, and what each addition adds to it."""
    bench = Bench(NARROW, "q,v", 8, 1, 8)
    plain = bench.optimizer()
    bench.step(plain)
    step = counted(lambda: bench.step(plain)).queued
    found = [{"addition": "the LoRA step", "operations": step, "waits": 0, "percent": 100.0}]
    for name, _, _, added in additions(bench):
        ours = "plain torch" not in name
        with _no_kernels() if ours else contextlib.nullcontext():
            operations = counted(added)
        found.append(
            {
                "addition": name, "operations": operations.queued,
                "waits": len(operations.waits), "percent": 100 * operations.queued / step,
            }
        )  # fmt: skip
    return found


def main() -> None:
    given = cost.parser(__doc__).parse_args()
    found = rows()
    for r in found:
        print(
            f"{r['addition']:<24}{r['operations']:>7} operations ({r['percent']:6.2f} %)"
            f"{r['waits']:>5} waits"
        )
    cost.keep(given.json, "host", {"shape": NARROW, "rows": found})


if __name__ == "__main__":
    main()
