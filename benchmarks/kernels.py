"""What the Triton kernels take of a GPU, compiled for one that need not be here.

    python -m benchmarks.kernels --capability 90

Registers, stack (a kernel that spills registers has one), shared memory, and how many instructions
of a thread each element of Ω costs: all of them, the multiply-adds among them, and the 4-byte words
that it moves through shared memory. Counted in the machine code, so a loop over the chunks of a
high rank counts once. At best a multiprocessor issues 128 of them in a cycle and serves 32 words.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import cost

RANKS = (8, 16, 32, 64, 128)
SIZES = ("m", "n", "k", "r", "k1", "k2")
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
COUNTED = ("instructions", "multiply_adds", "shared_words")


def compiled(kernel: Any, settings: dict[str, Any], capability: int) -> dict[str, Any]:
    """Registers, stack and shared memory of a kernel, and its instructions by kind."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {k: v for k, v in settings.items() if k in names}
    kinds = {n: "constexpr" if n in constants else "i32" if n in SIZES else "*fp32" for n in names}
    if settings.get("CODED"):
        kinds["Omega"] = "*u8"
    # As Triton does at a call: sizes and addresses that 16 divides let it load four floats at once.
    whole = [i for i, n in enumerate(names) if kinds[n] != "constexpr" and n not in ("k", "r")]
    binary = triton.compile(
        ASTSource(
            fn=kernel, signature=kinds,
            constexprs={(names.index(n),): v for n, v in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in whole},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={k: v for k, v in settings.items() if k in OPTIONS},
    )  # fmt: skip
    usage = _disassembled(binary.asm["cubin"], "--dump-resource-usage")
    code = _disassembled(binary.asm["cubin"], "--dump-sass")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ +)?([A-Z][\w.]*)", code)
    return {
        "registers": registers, "stack_bytes": stack, "shared_bytes": binary.metadata.shared,
        "instructions": len(instructions), "multiply_adds": instructions.count("FFMA"),
        "shared_words": sum(
            4 if ".128" in i else 2 if ".64" in i else 1
            for i in instructions if i.startswith(("LDS", "STS"))
        ),
    }  # fmt: skip


def _disassembled(cubin: bytes, what: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "kernel.cubin"
        path.write_bytes(cubin)
        run = [str(tool), what, str(path)]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout


def rows(capability: int) -> list[dict[str, Any]]:
    """One row for each kernel, rank and format of Ω."""
    from hlora.core.ops import fused

    cases = [("record", "fp32", "any", fused._accumulate, fused.square())]
    for r in RANKS:
        for form in ("fp32", "int8"):
            settings = fused.tiles(2 * r, r, form == "int8")
            cases.append(("penalty", form, str(r), fused._weigh, settings))
    found = []
    for kernel, form, rank, function, settings in cases:
        numbers = compiled(function, settings, capability)
        each = 32 * settings["num_warps"] / (settings["BM"] * settings["BN"])
        per = {f"{k}_per_element": numbers.pop(k) * each for k in COUNTED}
        found.append(
            {
                "kernel": kernel, "omega": form, "rank": rank, **numbers, **per,
                "tile": [settings["BM"], settings["BN"]], "warps": settings["num_warps"],
            }
        )  # fmt: skip
    return found


def main() -> None:
    parser = cost.parser(__doc__)
    parser.add_argument("--capability", type=int, default=90, help="90 is an H100, 89 an RTX 4090")
    parser.add_argument("--print", action="store_true", help="the numbers as JSON, no file")
    given = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed, so no kernel was compiled.")
        return
    import triton

    result = {
        "capability": given.capability, "triton": triton.__version__,
        "rows": rows(given.capability),
    }  # fmt: skip
    if given.print:
        print(json.dumps(result))
        return
    print(
        f"{'kernel':<9}{'Ω':<6}{'r':>4}{'tile':>9}{'warps':>6}{'regs':>6}{'stack':>7}{'shared':>8}"
        "   an element: instructions, multiply-adds, shared words"
    )
    for r in result["rows"]:
        tile = "×".join(map(str, r["tile"]))
        print(
            f"{r['kernel']:<9}{r['omega']:<6}{r['rank']:>4}{tile:>9}{r['warps']:>6}"
            f"{r['registers']:>6}{r['stack_bytes']:>7}{r['shared_bytes']:>8}"
            f"   {r['instructions_per_element']:.2f} {r['multiply_adds_per_element']:.2f} "
            f"{r['shared_words_per_element']:.2f}"
        )
    cost.keep(given.json, "kernels", result)


if __name__ == "__main__":
    main()
