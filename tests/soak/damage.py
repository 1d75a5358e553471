"""A file as it may be after a fall, a bad disk, or in the hands of somebody who means harm."""

from __future__ import annotations

import json
import random
import struct

from tests.damage import ODD, changed

SPLINTERS = [b"\0", b"NaN", b"[[[[", b"\xff\xfe", b"}", b"-1", b"1e999", b'"', b"{{", b"&a [*a]"]
VALUES = [*ODD, "\x1b[31m", "", -1e999, 2**63, "../../etc/passwd", {"": [None]}]


def damaged(draw: random.Random, good: bytes) -> bytes:
    """Cut, flipped, repeated, or with a value of another type."""
    at = draw.randrange(len(good)) if good else 0
    kind = draw.randrange(8)
    if kind == 0:
        return good[:at]
    if kind == 1:
        return good[:at] + bytes([draw.randrange(256)]) + good[at + 1 :]
    if kind == 2:
        return good[:at] + good[at // 2 :]
    if kind == 3:
        return good[:at] + draw.choice(SPLINTERS) + good[at:]
    if kind == 4 and draw.random() < 0.1:
        return good[:at] + b"[" * 100_000 + good[at:]
    return _inside(draw, good)


def _inside(draw: random.Random, good: bytes) -> bytes:
    """JSON, JSON lines, or the head of a safetensors file, with something in it changed."""
    try:
        if good[:1] in (b"{", b"["):
            lines = [good] if _is_json(good) else good.splitlines(keepends=True)
            i = draw.randrange(len(lines))
            lines[i] = json.dumps(changed(draw, json.loads(lines[i]), VALUES)).encode() + b"\n"
            return b"".join(lines)
        size = struct.unpack("<Q", good[:8])[0]
        head = json.dumps(changed(draw, json.loads(good[8 : 8 + size]), VALUES)).encode()
        return struct.pack("<Q", len(head)) + head + good[8 + size :]
    except (ValueError, struct.error, IndexError, TypeError):
        lines = good.split(b"\n")
        i = draw.randrange(len(lines))
        name, _, _ = lines[i].partition(b":")
        lines[i] = name + b": " + draw.choice(SPLINTERS)
        return b"\n".join(lines)


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True
