"""What `studies/forgetting.yaml` reads, made on this machine: two new domains, and kinds of text.

    python studies/data.py runs/data --data ../shared/data

Domains: `facts`, invented people, closed book; `people`, a fifth of them, five times as often;
`finnish`, messages of programs and their Finnish translations, from the catalogs of PyPI packages
(pip install --no-deps Django wagtail django-oscar django-cms). Text: one row a document, for
`per_document`. All of it is drawn with fixed seeds.
"""

from __future__ import annotations

import argparse
import gettext
import gzip
import hashlib
import importlib.util
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

CATALOGS = ("django", "wagtail", "oscar", "cms")
LANGUAGE = "fi"
PEOPLE, FACTS_TEST, TEST = 160, 200, 300
FEW = 32
"""So few that 200 steps of 16 rows ask about each twenty times, five in every wording."""
DOCUMENTS, CHARACTERS = 200, 1200

SYLLABLES = "ba, do, fe, ka, lu, mi, no, pe, ra, so, ta, vu, ze, gri, sta, mor, vel, tan, dri, nok"
FACTS = {
    "town": None,  # a name of its own
    "trade": "baker, carpenter, surveyor, beekeeper, glazier, tailor, ferryman, printer, mason, "
    "cooper, locksmith, weaver, farrier, potter, miller, bookbinder",
    "instrument": "cello, bassoon, harp, oboe, banjo, tuba, lute, zither, piccolo, accordion, "
    "marimba, viola, bagpipes, dulcimer, clarinet, mandolin",
    "pet": "ferret, tortoise, parrot, goat, hedgehog, rabbit, gecko, canary, donkey, ant farm, "
    "raven, pony, mole, otter, peacock, chinchilla",
    "dish": "lentil soup, plum cake, fried carp, onion tart, barley stew, pickled beets, rye "
    "pudding, leek pie, stuffed quail, nettle soup, cherry dumplings, smoked eel",
}
ASKED = {
    "town": ["Where was {} born?", "In which town did {} come into the world?",
             "Which town is the birthplace of {}?", "{} is a native of which town?",
             "Name the place where {} was born."],
    "trade": ["What is the trade of {}?", "How does {} earn a living?",
              "What work does {} do?", "By profession, what is {}?",
              "Name the occupation of {}."],
    "instrument": ["Which instrument does {} play?", "What does {} play in the evening?",
                   "On which instrument does {} practise?", "What instrument did {} learn?",
                   "Name the instrument that {} plays."],
    "pet": ["Which animal does {} keep?", "What pet lives with {}?",
            "What kind of pet does {} own?", "Which animal waits for {} at home?",
            "Name the pet of {}."],
    "dish": ["What is the favourite dish of {}?", "What does {} like to eat best?",
             "Which dish does {} always order?", "What would {} eat every day?",
             "Name the meal that {} loves most."],
}  # fmt: skip
"""The last wording of each is asked in the test only."""


def facts(seed: int = 0, people: int = PEOPLE) -> tuple[list[dict], list[dict]]:
    """Questions about invented people: the test asks known facts in a wording of its own."""
    draw = random.Random(seed)

    def name(parts: int) -> str:
        return "".join(draw.choice(SYLLABLES.split(", ")) for _ in range(parts)).capitalize()

    named = sorted({f"{name(2)} {name(3)}" for _ in range(people)})
    values = {k: v.split(", ") if v else sorted({name(3) for _ in range(40)})
              for k, v in FACTS.items()}  # fmt: skip
    train, test = [], []
    for person in named:
        for about, known in values.items():
            answer = draw.choice(known)
            wrong = draw.sample([v for v in known if v != answer], 3)
            rows = [_row(f"Question: {q.format(person)}\nAnswer:", answer, wrong, draw)
                    for q in ASKED[about]]  # fmt: skip
            train += rows[:-1]
            test.append(rows[-1])
    draw.shuffle(train)
    draw.shuffle(test)
    return train, test[:FACTS_TEST]


def finnish(seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Messages of at least two words and their translations; no translation is on both sides."""
    found: dict[str, str] = {}
    for package in CATALOGS:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            sys.exit(f"The package {package} is missing: see the head of this file.")
        root = Path(spec.submodule_search_locations[0])
        for file in sorted(root.rglob(f"{LANGUAGE}/LC_MESSAGES/django.mo")):
            with file.open("rb") as opened:
                catalog = gettext.GNUTranslations(opened)._catalog  # type: ignore[attr-defined]
            for message, told in catalog.items():
                if isinstance(message, str) and len(message.split()) > 1 and told != message:
                    clean = [" ".join(t.split()) for t in (message, told)]
                    if all(0 < len(t) <= 120 for t in clean) and "%" not in clean[0]:
                        found.setdefault(*clean)
    draw = random.Random(seed)
    pairs = sorted({told: message for message, told in sorted(found.items())}.items())
    draw.shuffle(pairs)
    answers = [told for told, _ in pairs]
    rows = []
    for told, message in pairs:
        wrong = draw.sample([a for a in answers if a != told], 3)
        rows.append(_row(f"English: {message}\nFinnish:", told, wrong, draw))
    return rows[TEST:], rows[:TEST]


def _row(prompt: str, answer: str, wrong: list[str], draw: random.Random) -> dict:
    choices = [answer, *wrong]
    draw.shuffle(choices)
    return {"prompt": prompt, "choices": choices, "answer": choices.index(answer)}


def kinds(data: Path) -> Iterator[tuple[str, list[dict]]]:
    """Kinds of text by name, the documents of each in an order that tells nothing."""
    for split in ("train", "test"):
        wiki = (data / f"general/wiki.{split}.txt").read_text("utf-8")
        yield f"wiki.{split}", _texts(re.split(r"\n ?= [^=\n]+ = ?(?=\n)", f"\n{wiki}"))
        # An abstract stands in lines; neighbours are told apart by length alone.
        pubmed = (data / f"general/pubmed.{split}.txt").read_text("utf-8").split("\n")
        yield f"pubmed.{split}", _texts(["\n".join(pubmed[i : i + 4])
                                         for i in range(0, len(pubmed), 4)])  # fmt: skip
        math = (data / f"general/math.{split}.txt").read_text("utf-8").split("\n\n")
        yield f"math.{split}", _texts(["\n\n".join(math[i : i + 4])
                                       for i in range(0, len(math), 4)])  # fmt: skip
        code = _split(_files(Path(gettext.__file__).parent, "*.py"), split)
        yield f"python.{split}", _texts(code)
    yield "licences", _texts(_files(Path("/usr/share/doc"), "copyright"))
    yield "perl", _texts(_files(Path("/usr/share"), "*.pm"))
    yield "manuals", _texts(_chapters(Path("/usr/share/info")))
    yield "chat", _chats(data / "tasks/arc_easy.train.jsonl")


def _split(texts: Iterable[str], split: str) -> list[str]:
    return [t for t in texts if (_shuffled(t) < "4") == (split == "test")]


def _files(root: Path, pattern: str) -> list[str]:
    """Files of a kind; site packages are none of Python's."""
    found = (f for f in sorted(root.rglob(pattern)) if "site-packages" not in f.parts)
    return [f.read_text("utf-8", "replace") for f in found if f.is_file()]


def _chapters(root: Path) -> list[str]:
    """The nodes of Info manuals, at most twelve of each."""
    found = []
    for file in sorted(root.glob("*.info*.gz")):
        with gzip.open(file, "rt", encoding="utf-8", errors="replace") as opened:
            nodes = opened.read().split("\x1f")
        found += [n.partition("\n\n")[2] for n in nodes if len(n) > 2 * CHARACTERS][:12]
    return found


def _texts(documents: Iterable[str]) -> list[dict]:
    """From within each document, for heads are alike; those too short are left out."""
    rows = {}
    for text in documents:
        start = text.find("\n", len(text) // 4) + 1
        part = text[start : start + CHARACTERS].strip()
        if len(part) >= CHARACTERS // 2:
            rows[part] = {"text": part}
    return [rows[p] for p in sorted(rows, key=_shuffled)][:DOCUMENTS]


def _chats(file: Path) -> list[dict]:
    """Three school questions and their answers, as turns of one chat."""
    chats: list[list[dict]] = [[] for _ in range(DOCUMENTS)]
    for i, line in enumerate(file.read_text("utf-8").splitlines()[: 3 * DOCUMENTS]):
        row = json.loads(line)
        of = row["choices"]
        told = of["text"][of["label"].index(row["answerKey"])]
        chats[i // 3] += [{"role": "user", "content": row["question"]},
                          {"role": "assistant", "content": told}]  # fmt: skip
    return [{"messages": c} for c in chats]


def _shuffled(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    of = parser.parse_args()
    of.output.mkdir(parents=True, exist_ok=True)
    files = dict(kinds(of.data))
    tasks = {"facts": facts(), "people": facts(people=FEW), "finnish": finnish()}
    for name, (train, test) in tasks.items():
        files |= {f"{name}.train": train, f"{name}.test": test}
    for name, rows in files.items():
        lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        (of.output / f"{name}.jsonl").write_text("".join(lines), "utf-8")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
