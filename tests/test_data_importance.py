"""importance.json of another shape is one error, whoever reads it."""

import json
import random

import pytest

import hlora
from hlora.cli import main as cli
from hlora.core import store
from tests.damage import changed

ODD = [None, [], {}, "x", [[]], {"a": {}}, True]


def test_deep_nesting_is_one_error(nu):
    (nu / store.MARKER).write_text("[" * 100_000)
    with pytest.raises(hlora.StoreError, match=r"importance\.json"):
        store.read_info(nu)


@pytest.mark.parametrize(
    "path",
    [
        ("format",), ("kind",), ("base_model",), ("base_model", "config"),
        ("base_model", "samples"), ("pairs",), ("norms",), ("files",), ("created",),
        ("recording",), ("summary",),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [3, "x", [1], True])
def test_a_part_of_another_type_is_refused(nu, path, value):
    marker = nu / store.MARKER
    info = json.loads(marker.read_text())
    at = info
    for key in path[:-1]:
        at = at[key]
    if type(at[path[-1]]) is type(value):
        return
    at[path[-1]] = value
    if path == ("format",) and value is True:
        return
    marker.write_text(json.dumps(info))
    with pytest.raises(hlora.StoreError, match=r"importance\.json"):
        store.read_info(nu)


def test_no_mutated_importance_is_a_traceback(nu, tmp_path):
    marker, draw, codes = nu / store.MARKER, random.Random(2), []
    good = json.loads(marker.read_text())
    for _ in range(100):
        info = changed(draw, good, [*ODD, -1, 10**400, 0.5], deeper=0.7)
        marker.write_text(json.dumps(info))
        codes.append(cli.main(["inspect", str(nu)]))
    assert set(codes) == {0, 2}
