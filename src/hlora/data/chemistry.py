"""A chemistry task from the facts in `mendeleev`: which element, which group.

A fact is asked in several wordings. Training and test have wordings of their own, so the test
asks in words that training did not use.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hlora.data.parse import packaged
from hlora.errors import InputError, optional

LONGEST = 110
"""Characters of a fact: a sentence or two."""
CHOICES = 4
WORDINGS_PER_FACT = 2
"""How many of the training wordings each fact is asked in."""


@dataclass(frozen=True)
class Fact:
    """What is told of an element, and what is asked for: its name, or its group."""

    about: str
    fact: str
    answer: str


def chemistry_rows(side: str, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of `train` or `test`: prompt, choices, answer.

    Raises:
        InputError: the package mendeleev is not installed.
    """
    facts, asked = _facts(), wordings()
    draw = random.Random(seed)
    for of, count in (("train", WORDINGS_PER_FACT), ("test", 1)):
        rows = [
            _row(fact, wording, facts, draw)
            for fact in facts
            for wording in draw.sample(asked[of][fact.about], count)
        ]
        draw.shuffle(rows)
        if of == side:  # both sides are drawn in one go, whichever is asked for
            return rows
    raise InputError(f"The chemistry task has no {side!r}: there are chemistry@train and @test.")


def wordings() -> dict[str, dict[str, list[str]]]:
    """Those of `train` and `test`, by what is asked."""
    return packaged("data", "chemistry.yaml")


def _row(fact: Fact, wording: str, facts: list[Fact], draw: random.Random) -> dict[str, Any]:
    same_kind = sorted({f.answer for f in facts if (f.about == "group") == (fact.about == "group")})
    wrong = draw.sample([a for a in same_kind if a != fact.answer], CHOICES - 1)
    choices = [fact.answer, *wrong]
    draw.shuffle(choices)
    return {
        "prompt": wording.format(fact=fact.fact),
        "choices": choices,
        "answer": choices.index(fact.answer),
    }


@lru_cache
def _facts() -> list[Fact]:
    fetch_table = optional("mendeleev.fetch", "The chemistry task needs", "demo").fetch_table
    groups = {row["id"]: row["name"] for row in fetch_table("series").to_dict("records")}
    facts = []
    for element in fetch_table("elements").to_dict("records"):
        name = element["name"]
        facts.append(Fact("group", name.lower(), groups[element["series_id"]].lower()))
        for about in ("uses", "sources", "name_origin"):
            text = element[about]
            if isinstance(text, str) and (told := _told(text, name)):
                facts.append(Fact(about, told, name))
    return facts


def _told(text: str, name: str) -> str:
    """The first sentences, with the element's name hidden."""
    text = " ".join(text.split())
    if len(text) > LONGEST:
        text = text[: max(text.rfind(". ", 0, LONGEST), text.rfind("; ", 0, LONGEST)) + 1]
    text = re.sub(rf"\b{re.escape(name)}\b", "the element", text, flags=re.IGNORECASE)
    return text if len(text) > 10 else ""
