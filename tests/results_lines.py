"""Made-up lines of a study, in the form that `hlora study` writes."""

from __future__ import annotations

import random
from typing import Any

FORGETTING = {"lora-mu": 0.3, "lora-nu-mu": 0.25, "ewc": 0.1, "hlora": 0.05, "l2": 0.2}


def line(method: str, task: str, seed: int, phi: float | None = None, **changes: Any) -> dict:
    """One run: forgetting by method with a little of the seed in it."""
    wobble = 0.01 * seed + 0.001 * len(task) * (seed % 2)
    wobble += random.Random(f"{method} {seed}").uniform(-0.002, 0.002)
    lost = FORGETTING.get(method, 0.0) + (wobble if method != "base" else 0.0)
    trained = method != "base"
    result = {
        "key": f"{method}-{task}-{seed}-{phi}", "error": None, "label": method,
        "run": {"method": method, "task": task, "seed": seed, "phi": phi},
        "study": {"model": "tiny", "tune": {"max_steps": 4}},
        "versions": {"hlora": "0.1.0", "commit": "abc", "torch": "2.13.0"},
        "machine": {"device": "a CPU", "threads": 1},
        "seen": ["wiki"], "unseen": ["docs"],
        "text": {
            k: {
                "loss": 3.0 + lost * (1 if k == "wiki" else 2), "tokens": 100, "perplexity": 0.0,
                "divergences": [abs(lost)] if trained else [],
            }
            for k in ("wiki", "docs")
        },
        "forgetting": {
            k: {"nats": lost * by, "se": 0.01}
            for k, by in {"wiki": 1, "seen": 1, "docs": 2, "unseen": 2}.items()
        },
        "task": {
            "acc": 0.5, "acc_norm": 0.5, "acc_se": 0.05, "nll": 4.0 + seed * 0.1, "n": 100,
            "nll_se": 0.1,
        },
        "settings": {},
    }  # fmt: skip
    if trained:
        result |= {
            "settings": {
                "record": {"max_steps": 4, "batch_size": 2, "block_size": 8},
                "tune": {
                    "batch_size": 2, "lora_rank": 8, "lora_alpha": 32, "learning_rate": 1e-3,
                    "dtype": "bf16",
                },
            },
            "seconds": {"record": 60.0, "tune": 5.0}, "steps": 4, "importance_bytes": 1000,
            "recorded": {"seconds": 60.0},
            "log": [
                {"step": i, "loss": 4 - i, "R": r, "penalty": r * 0.01, "total_loss": 4 - i + r}
                for i, r in enumerate((0.0, 2.0, 1.0))
            ],
            "norms": {
                f"model.layers.{b}.self_attn.{t}": (2.0 if t == "v_proj" else 1.0)
                * (3.0 if b in (0, 1, 2, 3, 7) else 1.0)
                for b in range(8)
                for t in ("q_proj", "v_proj")
            },
        }  # fmt: skip
    if method.startswith("ewc"):
        result["recorded"] = {"seconds": 10.0, "sequences": 100}
        result["seconds"] = {"record": 10.0, "tune": 5.0}
        if method == "ewc-original":
            result["recorded"]["all_parameters_bytes"] = 50_000
    return {**result, **changes}


def study(seeds: int = 3, tasks: tuple[str, ...] = ("sciq", "piqa")) -> list[dict]:
    """Base, two plain LoRAs, EWC, HLoRA at two φ and L2."""
    rows = [
        ("base", None), ("lora-mu", None), ("lora-nu-mu", None), ("ewc", 0.01),
        ("ewc-original", 0.01), ("hlora", 0.003), ("hlora", 0.01), ("l2", 0.03),
    ]  # fmt: skip
    return [
        line(method, task, seed, phi)
        for seed in range(seeds)
        for task in tasks
        for method, phi in rows
    ]
