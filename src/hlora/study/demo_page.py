"""The demo's table, for the terminal and the page, and the page itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hlora.files import size
from hlora.study.demo_story import HLORA, NU, PLAIN
from hlora.study.html import Section, Table, write_report
from hlora.study.plots import as_svg, forgetting_chart, heatmap, loss_curves, several_losses

TITLE = "LoRA that does not forget"


def results_table(results: dict[str, Any]) -> Table:
    """One row a model: the domain, the general text, the cost."""
    kinds = [*results["seen"], results["unseen"]]
    headings = [
        "model", "accuracy %", "NLL",
        *(f"PPL {k}" + ("*" if k == results["unseen"] else "") for k in kinds),
        "forgot, seen", "forgot, unseen*", "seconds", "importance",
    ]  # fmt: skip
    rows = []
    for row in results["rows"]:
        task, lost = row["task"], row["forgetting"]
        rows.append(
            [
                row["method"],
                f"{100 * task['acc']:.1f} ± {100 * task['acc_se']:.1f}",
                f"{task['nll']:.2f} ± {task['nll_se']:.2f}",
                *(f"{row['text'][k]['perplexity']:.2f}" for k in kinds),
                *(
                    f"{lost[w]['nats']:+.3f} ± {lost[w]['se']:.3f}" if lost else "0"
                    for w in ("seen", "unseen")
                ),
                f"{row['seconds']:.0f}" if row["seconds"] else "–",
                size(row["importance_bytes"]) if row["importance_bytes"] else "–",
            ]
        )
    return Table(headings, rows, strong=HLORA)


def note(results: dict[str, Any]) -> str:
    """What the table's columns mean, and how much stands behind them."""
    row = results["rows"][0]
    tokens = row["text"][results["unseen"]]["tokens"]
    return (
        f"One seed ({results['settings']['seed']}). Accuracy and NLL (nats, of the right answer) "
        f"over {row['task']['n']} chemistry questions in words that training did not use. "
        f"Perplexity over {tokens:,} tokens of each kind. Forgetting: loss on general text minus "
        "the base model's, nats per token; below zero, the text was learned. ± is one standard "
        f"error. * {results['unseen']} is in no training text: what is lost there is general "
        "ability. Seconds of training, phase ν included where there is one."
    )


def verdict(results: dict[str, Any]) -> str:
    """What this run found, whichever way it went."""
    rows = {r["method"]: r for r in results["rows"]}
    parts = []
    for which, text in (("seen", "text like phase ν's"), ("unseen", results["unseen"])):
        nats, se = results["saved"][which]["nats"], results["saved"][which]["se"]
        if abs(nats) < 2 * se or not nats:
            parts.append(f"as much as LoRA(ν+μ) on {text}, within the noise")
        else:
            word = "less" if nats > 0 else "MORE"
            parts.append(f"{abs(nats):.3f} ± {se:.3f} nats per token {word} on {text}")
    ours, plain = rows[HLORA]["task"], rows[PLAIN]["task"]
    return (
        f"With the penalty (HLoRA) the model forgot {', and '.join(parts)}, compared with the same "
        f"training without it (LoRA(ν+μ)). Accuracy on chemistry: {100 * ours['acc']:.1f} % and "
        f"{100 * plain['acc']:.1f} %, ± {100 * ours['acc_se']:.1f}; NLL of the right answer: "
        f"{ours['nll']:.2f} and {plain['nll']:.2f}."
    )


def forgetting_figure(results: dict[str, Any]) -> Any:
    """Forgetting by kind of text, the unseen one last."""
    kinds = {k: k for k in results["seen"]}
    kinds[results["unseen"]] = f"{results['unseen']} (unseen)"
    return forgetting_chart(
        {
            label: {
                r["method"]: (r["forgetting"][k]["nats"], r["forgetting"][k]["se"])
                for r in results["rows"]
                if r["forgetting"]
            }
            for k, label in kinds.items()
        },
        highlight=HLORA,
    )


def write_page(path: Path, results: dict[str, Any]) -> None:
    """The self-contained report."""
    machine = results["machine"]
    names = [r["method"] for r in results["rows"] if r["method"] != NU]
    asked = Table(
        ["question", "right", *names],
        [
            [q["prompt"], q["right"], *(_marked(q["answers"][n], q["right"]) for n in names)]
            for q in results["questions"]
        ],
        prose=True,
    )
    write_report(
        path,
        TITLE,
        verdict(results),
        [
            Section("Results", note(results), results_table(results), [
                (as_svg(forgetting_figure(results)),
                 "Change of the loss on each kind of text against the base model, ± one standard "
                 "error. Right of zero is forgotten."),
            ]),
            Section("Training", figures=[
                (as_svg(several_losses(results["logs"])),
                 "The task's loss. LoRA(μ) and the others take the same steps on the same rows."),
                (as_svg(loss_curves(results["logs"][HLORA])),
                 "HLoRA's loss and φR (the paper's Fig. 4): zero at the anchor, it rises as the "
                 "task pulls θ away."),
            ]),
            Section("What phase ν remembered",
                "‖Ω‖₂ of each target matrix: bright layers are held where ν left them.",
                figures=[(as_svg(heatmap(results["norms"])), "Log scale (the paper's Fig. 7).")]),
            Section("Some questions of the test",
                "The answer with the highest likelihood of four; ✓ is right.", asked),
            Section("How this was made",
                f"hlora {results['hlora_version']}, Python {machine['python']}, torch "
                f"{machine['torch']}, {machine['cores']} threads on {machine['processor']} "
                f"({machine['device']}, {machine['dtype']}). The demo ran these commands; φ = 0 is "
                "plain LoRA.", code="\n".join(results["commands"])),
        ],
    )  # fmt: skip


def _marked(answer: str, right: str) -> str:
    return f"{answer} ✓" if answer == right else answer
