"""The penalty in PEFT's own method comparison, which trains in a loop of its own.

    python -m benchmarks.peft_suite peft/method_comparison/MetaMathQA base 1 \
        -v experiments/lora/llama-3.2-3B-rank32-hlora-phi1

The suite's folder, an importance folder, φ, and what its run.py takes. Nothing of the suite is
changed: where it makes its optimizer, the penalty joins it. See docs/peft-suite.md.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import hlora
from hlora.hf.peft import UNHELD

MAKER = "get_optimizer_and_scheduler"
"""The function of the suite's utils.py that makes the optimizer of a model."""


def join(utils: Any, penalty: hlora.Penalty) -> None:
    """Have the suite's optimizer start the penalty when it is made."""
    make = getattr(utils, MAKER, None)
    if make is None:
        raise hlora.InputError(
            f"{utils.__file__} has no {MAKER}, where the penalty would join: take the version of "
            "PEFT's suite that docs/peft-suite.md names."
        )

    def joined(model: Any, **given: Any) -> Any:
        optimizer, scheduler = make(model, **given)
        penalty.start(model, optimizer)
        return optimizer, scheduler

    setattr(utils, MAKER, joined)


def run(suite: Path, argv: list[str], penalty: hlora.Penalty | None) -> None:
    """The suite's run.py with these arguments; without a penalty, as the suite is."""
    for name in ("run.py", "utils.py"):
        if not (suite / name).is_file():
            raise hlora.InputError(
                f"{suite} has no {name}: give the folder method_comparison/MetaMathQA of PEFT."
            )
    os.chdir(suite)
    sys.path.insert(0, os.getcwd())
    if penalty is not None:
        join(importlib.import_module("utils"), penalty)
    sys.argv = ["run.py", *argv]
    runpy.run_path("run.py", run_name="__main__")
    if penalty is None:
        return
    if penalty.steps is None:
        raise hlora.InputError("The suite made no optimizer, so nothing was held.")
    print(f"φ {float(penalty.phi):g}, R {float(penalty.value()):.4g} at the end")


def held(importance: Path, phi: float, **settings: Any) -> hlora.Penalty:
    """To the base model: the suite compares with the model as it is before the first step."""
    return hlora.Penalty(importance.resolve(), phi=phi, anchor="base", **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--unheld", choices=UNHELD, default="refuse", help="as of hlora.Penalty")
    parser.add_argument("suite", type=Path)
    parser.add_argument("importance", type=Path)
    parser.add_argument("phi", type=float)
    parser.add_argument("run", nargs=argparse.REMAINDER, help="arguments of the suite's run.py")
    args = parser.parse_args()
    try:
        run(args.suite, args.run, held(args.importance, args.phi, unheld=args.unheld))
    except hlora.HloraError as error:  # what the suite itself raises is left as it is
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
