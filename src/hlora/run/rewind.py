"""A finished adapter scaled back along its own path until it forgets no more than a budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hlora import __version__
from hlora.core import card, store
from hlora.core import rewind as core
from hlora.core.budget import check_budget
from hlora.core.finite import broken_weight
from hlora.core.lowrank import LowRank
from hlora.core.pairs import Group, group
from hlora.data.answers import answer_rows
from hlora.data.rows import Collate
from hlora.errors import InputError
from hlora.files import publish, refuse_result, write_json
from hlora.hf.hub import check_name, located, pinned, push
from hlora.hf.peft import PLAIN_FIRST, base_of, find_pairs, save_adapter, starts_at_base
from hlora.run import machine
from hlora.run.evaluate import Forgetting, divergence, score_task
from hlora.run.inputs import check_apart
from hlora.run.models import load_adapter
from hlora.run.outputs import tidied, whole
from hlora.run.progress import bar, unbroken
from hlora.run.scoring import prepare
from hlora.run.settings import EvalSettings, RewindSettings, listed

logger = logging.getLogger(__name__)

REWOUND = "rewind.json"
"""The marker of a rewound adapter."""
SHARES = (1.0, 0.75, 0.5, 0.25)
"""Points of the curve that are always shown; 1 is the adapter as it was."""
ALIKE, OWN = "every matrix alike", "each matrix its own"
CLOSE = 0.95
"""A measurement within the budget and above this share of it is close enough."""
TRIES = 8
LOOKED_AT = 32
"""Rows of the task whose gradients say how much each matrix matters for it."""


@dataclass(frozen=True)
class Point:
    """One place on the way back.

    Attributes:
        way: `ALIKE` or `OWN`.
        share: square root of the predicted forgetting that is kept.
        scales: by matrix.
        predicted: nats per token, by the importance; None without one.
        measured: on the general text.
        nll: of the domain's right answers, nats per answer; None without a task.
    """

    way: str
    share: float
    scales: dict[str, float]
    predicted: float | None
    measured: Forgetting
    nll: float | None = None


@dataclass(frozen=True)
class Rewound:
    """The curve by way, and the point that was written."""

    folder: Path
    points: list[Point]
    chosen: Point


@tidied
def rewind(settings: RewindSettings) -> Rewound:
    """Scale an adapter back, and write it.

    Raises:
        HloraError: an adapter, importance, text or task that cannot be used.
    """
    check_budget(settings.forget_at_most)
    check_name(settings.push_to_hub)
    settings = replace(
        settings, adapter=pinned(settings.adapter),
        importance=pinned(settings.importance) if settings.importance else None,
    )  # fmt: skip
    output = Path(settings.output)
    if output.resolve() == Path(settings.adapter).resolve():
        raise InputError("--output is the adapter's own folder: choose another.")
    check_apart(settings.output, listed(settings.importance), model=settings.model)
    refuse_result(output, settings.overwrite)
    stored = store.load(located(settings.importance)) if settings.importance else None
    if stored and not stored.importance.natural:
        raise InputError(
            f"{settings.importance} holds {stored.importance.kind} importance, which predicts no "
            "forgetting: record with --kind blend."
        )
    model, tokenizer, kinds, tasks = prepare(_scoring(settings))
    model = load_adapter(model, settings.adapter, trainable=True)
    if not starts_at_base(model):
        raise InputError(
            f"The initialization of {settings.adapter} moved the base model, so a scaled adapter "
            f"is not between the two: {PLAIN_FIRST}"
        )
    pairs = find_pairs(model)
    if stored:
        stored.check(base_of(model, pairs), pairs, ranks=False)
    walk = _Walk(model, group(pairs), torch.cat(list(kinds.values())), settings.batch_size, stored)

    def measure(way: str, share: float) -> Point:
        point = walk.measure(way, share)
        if not math.isfinite(point.measured.nats):
            if name := broken_weight(model):
                raise InputError(f"The base model's {name} is not finite: take another copy.")
            raise InputError(f"{settings.adapter} gives no finite predictions: train it again.")
        nll = [score_task(model, tokenizer, t, batch_size=settings.batch_size).nll for t in tasks]
        return replace(point, nll=nll[0]) if nll else point

    points = [measure(ALIKE, share) for share in SHARES]
    if points[0].measured.nats <= settings.forget_at_most:
        candidates = points[:1]
    else:
        candidates = [_found(measure, ALIKE, points, settings.forget_at_most)]
    if stored and candidates[0] is not points[0]:
        walk.K = core.costs(walk.sizes, _task_gradients(model, walk.groups, tokenizer, tasks))
        own = [points[0], *(measure(OWN, share) for share in SHARES[1:])]
        candidates.append(_found(measure, OWN, own, settings.forget_at_most))
        points += own[1:]
    # The domain has the last word; without one, all alike, which was better wherever measured.
    chosen = min(candidates, key=lambda p: math.inf if p.nll is None else p.nll)
    points += [p for p in candidates if p not in points]
    walk.go(chosen.way, chosen.share)
    result = Rewound(output, sorted(points, key=lambda p: (p.way, -p.share)), chosen)
    with unbroken(f"Stopped. {whole(output)}"), publish(output, REWOUND) as aside:
        save_adapter(model, aside)
        info = {
            "hlora_version": __version__, "settings": asdict(settings),
            "base_model": base_of(model, pairs), "versions": machine.versions(),
            "chosen": asdict(chosen), "points": [asdict(p) for p in result.points],
        }  # fmt: skip
        write_json(aside / REWOUND, info)
        card.write_card(aside, card.rewound(info))
    if settings.push_to_hub:
        push(output, settings.push_to_hub, public=settings.public)
    return result


def within_budget(
    model: nn.Module, text: Tensor, at_most: float, batch_size: int
) -> tuple[Point, Point]:
    """Measure the trained adapter on text (N, T), and scale it back if it is above the budget.

    What was trained is kept whatever is measured: one that cannot be scaled back stays as it is.

    Returns:
        The adapter as it was, and as it is now.
    """
    walk = _Walk(model, group(find_pairs(model)), text, batch_size)
    whole = walk.measure(ALIKE, 1.0)
    if whole.measured.nats <= at_most:
        return whole, whole
    if not math.isfinite(whole.measured.nats):
        logger.warning(
            "The adapter gives no finite predictions on the text of the budget, so it is kept as "
            "it was trained: train it again with a tenth of the learning rate, or with another "
            "--dtype than fp16."
        )
        return whole, whole
    chosen, least = _search(walk.measure, ALIKE, [walk.measure(ALIKE, 0.5), whole], at_most)
    if chosen is None:
        logger.warning("%s It is kept as it was trained.", _out_of_reach(least, at_most))
        chosen = whole
    walk.go(ALIKE, chosen.share)
    return whole, chosen


def _scoring(settings: RewindSettings) -> EvalSettings:
    of = vars(settings)
    shared = (
        "model", "device", "dtype", "load_in_4bit", "load_in_8bit", "text", "text_column",
        "task_format", "block_size", "text_blocks", "task_rows", "batch_size",
    )  # fmt: skip
    task = [settings.task] if settings.task else []
    return EvalSettings(**{k: of[k] for k in shared}, task=task)


def _found(
    measure: Callable[[str, float], Point], way: str, curve: list[Point], budget: float
) -> Point:
    """The same as `_search`, refused where nothing is below the budget."""
    found, least = _search(measure, way, curve, budget)
    if found is None:
        raise InputError(_out_of_reach(least, budget))
    return found


def _out_of_reach(least: Point, budget: float) -> str:
    even = f"Even at {least.share:.2g} of its change the adapter"
    if not math.isfinite(least.measured.nats):
        return f"{even} gives no finite predictions, so the budget {budget:g} is out of reach."
    return (
        f"{even} forgets {least.measured.nats:.2g} nats per token: the budget {budget:g} is too "
        "small to be measured."
    )


def _search(
    measure: Callable[[str, float], Point], way: str, curve: list[Point], budget: float
) -> tuple[Point | None, Point]:
    """The point nearest below the budget, measured, if there is one; and that of least share.

    What is not finite is above the budget.
    """
    seen = sorted(curve, key=lambda p: p.share)
    for _ in range(TRIES):
        below = [p for p in seen if p.measured.nats <= budget]
        above = [p for p in seen if not p.measured.nats <= budget]
        if below and below[-1].measured.nats >= CLOSE * budget:
            break
        a, b = (below[-1], above[0]) if below else above[:2]
        seen = sorted([*seen, measure(way, _between(a, b, budget))], key=lambda p: p.share)
    below = [p for p in seen if p.measured.nats <= budget]
    return below[-1] if below else None, seen[0]


def _between(a: Point, b: Point, budget: float) -> float:
    """The share to try next, from two points of which b, at least, is above the budget."""
    if not (math.isfinite(a.measured.nats) and math.isfinite(b.measured.nats)):
        return (a.share + b.share) / 2 if a.measured.nats <= budget else a.share / 2
    # Near the budget, forgetting is about a power of the share.
    lost = max(a.measured.nats, 1e-12) / b.measured.nats
    power = math.log(lost) / math.log(a.share / b.share)
    goal = (0.5 + 0.5 * CLOSE) * budget
    return b.share * (goal / b.measured.nats) ** (1 / min(max(power, 0.3), 4.0))


class _Walk:
    """Moves the adapter along its path and back, and measures on text (N, T)."""

    def __init__(
        self, model: nn.Module, groups: list[Group], text: Tensor, batch_size: int,
        stored: store.Stored | None = None,
    ) -> None:  # fmt: skip
        self.model, self.groups, self.text, self.batch_size = model, groups, text, batch_size
        self.whole = [g.factors() for g in groups]
        self.names = [n for g in groups for n in g.names]
        self.Q: Tensor | None = None
        if stored:
            changes = [LowRank(g.s * B, A) for g, (B, A) in zip(groups, self.whole, strict=True)]
            self.sizes = torch.cat([c.sum_of_squares().cpu() for c in changes])
            stored.importance.arrange(groups)
            self.Q = stored.importance.coupling(groups, changes).cpu().double()
            self.K = core.costs(self.sizes)  # until the domain's rows say more

    def measure(self, way: str, share: float) -> Point:
        scales, predicted = self.go(way, share)
        with bar(f"{way}, {share:.2f}", len(self.text)) as shown:
            lost = divergence(self.model, self.text, batch_size=self.batch_size, tick=shown.update)
        return Point(way, share, scales, predicted, lost)

    def go(self, way: str, share: float) -> tuple[dict[str, float], float | None]:
        """To a point of the path; its scales, and its predicted forgetting."""
        alpha = torch.full((len(self.names),), share, dtype=torch.float64)
        if way == OWN:
            assert self.Q is not None
            alpha = core.scales(self.Q, self.K, share)
        start = 0
        for g, (B, A) in zip(self.groups, self.whole, strict=True):
            part = alpha[start : start + len(g.names)].to(B)
            g.set_factors(B * part[:, None, None], A)
            start += len(g.names)
        predicted = None if self.Q is None else float(alpha @ self.Q @ alpha)
        return dict(zip(self.names, alpha.tolist(), strict=True)), predicted


def _task_gradients(
    model: nn.Module, groups: list[Group], tokenizer: Any, tasks: list[Any]
) -> Tensor | None:
    """⟨g_nl, D_l⟩ of the domain's rows at the trained weights, (N, L): how each scale matters."""
    if not tasks:
        return None
    found = []
    collate = Collate(tokenizer.pad_token_id)
    model.eval()
    for row in answer_rows(tasks[0], tokenizer, 512).rows[:LOOKED_AT]:
        batch = {k: v.to(groups[0].device) for k, v in collate([row]).items()}
        model.zero_grad()
        model(**batch).loss.backward()
        # D = s·B·A, so that scaling B scales D.
        of_row = [(g.gradients()[0] * g.factors()[0]).sum((1, 2)) for g in groups]
        found.append(torch.cat([t.double().cpu() for t in of_row]))
    model.zero_grad()
    return torch.stack(found)
