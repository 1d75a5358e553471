"""A chemistry task from the facts in `mendeleev`: which element, which group.

A fact is asked in several wordings. Training and test have wordings of their own, so the test
asks in words that training did not use.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from hlora.errors import InputError

LONGEST = 110
"""Characters of a fact: a sentence or two."""
CHOICES = 4
WORDINGS_PER_FACT = 2
"""How many of the training wordings each fact is asked in."""

TRAIN = {
    "uses": (
        "Question: Which element has these uses? {fact}\nAnswer:",
        "What it is used for: {fact}\nThe element is",
        "Chemistry quiz. Name the element with this application: {fact}\nElement:",
    ),
    "sources": (
        "Question: Which element comes from here? {fact}\nAnswer:",
        "Where it is found or how it is made: {fact}\nThe element is",
        "Chemistry quiz. Name the element with this occurrence: {fact}\nElement:",
    ),
    "name_origin": (
        "Question: Which element has a name of this origin? {fact}\nAnswer:",
        "Its name comes from: {fact}\nThe element is",
        "Chemistry quiz. Name the element with this etymology: {fact}\nElement:",
    ),
    "group": (
        "Question: To which group of elements does {fact} belong?\nAnswer:",
        "In the periodic table, {fact} is one of the",
        "Chemistry quiz. Name the family of the element {fact}.\nFamily:",
    ),
}
TEST = {
    "uses": (
        "People put this element to work as follows. {fact}\nWhich one is it? It is",
        "Industry note: {fact}\nQ: Which chemical element is the note about?\nA:",
    ),
    "sources": (
        "A student asks which element one gets this way. {fact}\nThe teacher says:",
        "Mining note: {fact}\nQ: Which chemical element is the note about?\nA:",
    ),
    "name_origin": (
        "Somebody named an element after this. {fact}\nThat element is called",
        "Word history: {fact}\nQ: Which chemical element got its name so?\nA:",
    ),
    "group": (
        "A chemist who sorts the elements puts {fact} with the",
        "Q: What kind of element is {fact}?\nA: It belongs to the",
    ),
}


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
    facts = _facts()
    draw = random.Random(seed)
    for of, wordings, count in (("train", TRAIN, WORDINGS_PER_FACT), ("test", TEST, 1)):
        rows = [
            _row(fact, wording, facts, draw)
            for fact in facts
            for wording in draw.sample(wordings[fact.about], count)
        ]
        draw.shuffle(rows)
        if of == side:  # both sides are drawn in one go, whichever is asked for
            return rows
    raise InputError(f"The chemistry task has no {side!r}: there are chemistry@train and @test.")


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


def _facts() -> list[Fact]:
    try:
        from mendeleev.fetch import fetch_table
    except ImportError:
        raise InputError(
            "The chemistry task needs the package mendeleev: pip install 'hlora[demo]'."
        ) from None
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
