"""Files that appear whole or not at all."""

import errno
import json
import math
import os

import pytest

import hlora
from hlora import files


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"x": "ξ"})
    before = path.read_bytes()

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"x": 2})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_result_moves_in_whole(tmp_path):
    folder = tmp_path / "r"
    with files.publish(folder, "done.json") as aside:
        (aside / "data").write_text("1")
        (aside / "done.json").write_text("{}")
        assert not (folder / "done.json").exists()
    assert sorted(p.name for p in folder.iterdir()) == ["data", "done.json"]


def test_an_interrupted_result_touches_nothing(tmp_path):
    folder = tmp_path / "r"
    with files.publish(folder, "tune.json") as aside:
        (aside / "tune.json").write_text("first")

    def interrupted():
        with files.publish(folder, "tune.json") as aside:
            (aside / "tune.json").write_text("second")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (folder / "tune.json").read_text() == "first"
    assert [p.name for p in folder.iterdir()] == ["tune.json"]


def test_an_output_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(hlora.InputError, match="is a file"):
        files.refuse_result(tmp_path / "file", False)
    with pytest.raises(hlora.InputError, match="sub"):
        files.refuse_result(tmp_path / "file" / "sub", True)
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(hlora.InputError, match="adapter_config"):
        files.refuse_result(folder, False)
    files.refuse_result(folder, True)


def test_only_a_folder_of_ours_without_a_file_is_taken_away(tmp_path):
    for where in ("a/b", "a/c"):
        files.refuse_result(tmp_path / where, False)
        files.unlock(tmp_path / where)
    (tmp_path / "a" / "c" / "checkpoints").mkdir()  # as Trainer does
    for where in ("a/b", "a/c"):
        files.take_away(tmp_path / where)
    assert not list(tmp_path.iterdir())
    files.refuse_result(tmp_path / "a" / "b", False)
    (tmp_path / "a" / "b" / "file").write_text("")
    (tmp_path / "others").mkdir()
    for where in ("a/b", "others", "nowhere"):
        files.take_away(tmp_path / where)
    assert (tmp_path / "a" / "b" / "file").exists()
    assert (tmp_path / "others").exists()
    files.unlock(tmp_path / "a" / "b")


def test_no_space_is_said_before_anything_is_done(tmp_path):
    with pytest.raises(hlora.InputError, match="8388608"):
        files.check_space(tmp_path / "a" / "b", 1 << 63)
    files.check_space(tmp_path, 1)


def test_a_full_disk_is_recognised_whoever_says_so():
    assert files.is_full_disk(OSError(errno.ENOSPC, "x"))
    assert files.is_full_disk(OSError(errno.EFBIG, "File too large"))
    assert files.is_full_disk(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not files.is_full_disk(RuntimeError("something else"))
    hidden = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 9 vs 8")
    hidden.__context__ = RuntimeError("basic_ios::clear: iostream error")
    assert files.is_full_disk(hidden)  # torch.save on a full disk


@pytest.mark.parametrize(
    ("count", "text"),
    [(10, "10 B"), (1536, "1.5 KiB"), (300 << 20, "300 MiB"), (5 << 40, "5.0 TiB")],
)
def test_sizes_for_people(count, text):
    assert files.size(count) == text


def test_json_has_no_number_that_is_none(tmp_path):
    """Other readers than Python's refuse NaN."""
    path = tmp_path / "a.json"
    files.write_json(path, {"a": math.nan, "b": [1.5, (math.inf, {"c": -math.inf})], "d": "NaN"})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, [None, {"c": None}]], "d": "NaN"}
