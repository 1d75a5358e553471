"""Compile the kernels for a GPU that need not be here, and print the shared memory that each takes.

Run by test_fused.py in a process of its own: where the interpreter is on, nothing can be compiled.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hlora.ops import fused

TILE = ("K", "K1", "K2", "BM", "BN", "CODED")


def shared(kernel, constants: dict, **options) -> int:
    names = kernel.arg_names
    sizes = dict.fromkeys(("m", "n", "k", "k1", "k2"), "i32")
    signature = {a: "constexpr" if a in TILE else sizes.get(a, "*fp32") for a in names}
    source = ASTSource(
        fn=kernel, signature=signature,
        constexprs={(names.index(a),): v for a, v in constants.items()},
    )  # fmt: skip
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    return triton.compile(source, target=target, options=options).metadata.shared


def main() -> None:
    found = {}
    for K in (16, 64, 128, 256):
        tall = fused._rows_of_a_strip(K)
        found[f"weigh, K {K}"] = shared(
            fused._weigh, {"K": K, "BM": tall, "BN": fused.WIDE, "CODED": False},
            num_warps=fused.warps(tall), num_stages=fused.STAGES,
        )  # fmt: skip
    for K in (128, 256):
        side = fused.side(K)
        tile = {"K1": K // 2, "K2": K, "BM": side, "BN": side}
        found[f"accumulate, K {K}"] = shared(fused._accumulate, tile, num_warps=4)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
