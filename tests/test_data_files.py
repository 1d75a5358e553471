"""Files of every kind: each is read as what it is, or refused by one sentence."""

import gzip
import json
import logging

import pytest

import hlora
from hlora.data.read import data_files
from hlora.data.source import Source
from hlora.data.tasks import load_task
from hlora.data.text import blocks
from tests.tiny import tokenizer, write_rows

ROWS = [{"id": i, "text": f"document {i} of a few"} for i in range(5)]
LINES = "".join(json.dumps(r) + "\n" for r in ROWS)
CSV = "id,text\r\n" + "".join(f'{r["id"]},"{r["text"]}"\r\n' for r in ROWS)


@pytest.fixture(scope="module")
def words():
    return tokenizer()


def texts(path, column=None):
    return ["".join(d.text) for d in Source.parse(str(path), column).documents()]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ndjson", LINES.encode()),
        ("A.JSONL", LINES.encode()),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("array.jsonl", json.dumps(ROWS).encode()),
        ("a.csv", CSV.encode()),
        ("a.CSV", CSV.replace(",", ";").encode()),
        ("a.tsv", CSV.replace(",", "\t").encode()),
        ("mark.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("mark.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("wide.jsonl", LINES.encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.CSV.GZ", gzip.compress(CSV.encode(), mtime=0)),
        ("packed.jsonl", gzip.compress(LINES.encode(), mtime=0)),
    ],
)
def test_rows_are_read_whatever_they_are_stored_as(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name) == [r["text"] for r in ROWS]
    assert texts(tmp_path) == [r["text"] for r in ROWS]


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.txt.gz", "a.md"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_is_read_without_the_mark_of_its_encoding(tmp_path, name, mark):
    content = mark + "größer\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert texts(tmp_path / name) == ["größer\n"]
    assert Source.parse(str(tmp_path / name)).name.lower() == "a"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", LINES.encode(), "JSON"),
        ("a.md", json.dumps(ROWS, indent=1).encode(), "JSON"),
        ("a.txt", b"a\0b" * 9, "binary"),
        ("a.jsonlines", LINES.encode(), "ending"),
        ("a.zip", b"PK\3\4", "ending"),
        ("noending", LINES.encode(), "ending"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "cannot be read"),
        ("a.txt.gz", b"\x1f\x8b\x08\x00broken", "cannot be read"),
        ("a.jsonl", b"[" * 100_000, "deep"),
        ("a.json", b'{"text": ' * 100_000, "deep"),
        ("a.csv", b'text\n"open', "CSV"),
        ("a.csv", b"text\none,two\n", "row 1"),
        ("a.csv", b"text,text\none,two\n", "two columns"),
        ("a.json", b"3", "object"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, words, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(hlora.InputError, match=message) as error:
        blocks(Source.parse(str(tmp_path / name)), words, 8)
    assert name in str(error.value)


def test_a_folder_s_own_notes_are_not_its_text(tmp_path):
    for name in (
        "README.md", "readme.txt", "LICENSE.txt", "dataset_info.json", ".a.txt", ".git/b.txt",
        "state.json", "x/README.md", "__pycache__/c.txt",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("notes")
    with pytest.raises(hlora.InputError, match="no text"):
        data_files(tmp_path)
    (tmp_path / "x" / "readable.txt").write_text("text")
    assert [p.name for p in data_files(tmp_path)] == ["readable.txt"]


def test_a_hidden_folder_above_is_no_matter(tmp_path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.txt").write_text("text")
    assert texts(tmp_path / ".cache") == ["text"]


def test_saved_data_sets_load(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    both = datasets.DatasetDict(train=one, test=one.select([1]))
    both.save_to_disk(str(tmp_path / "both"))
    assert texts(tmp_path / "one") == texts(tmp_path / "both") == [r["text"] for r in ROWS]
    assert texts(f"{tmp_path / 'both'}@test") == [ROWS[1]["text"]]
    with pytest.raises(hlora.InputError, match="train, test"):
        texts(f"{tmp_path / 'both'}@dev")


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_rows_without_text_are_counted_and_never_words(tmp_path, nothing, caplog):
    rows = [{"id": "a", "text": nothing}, {"id": "b", "text": "fine"}, {"id": "c"}]
    with caplog.at_level(logging.WARNING, "hlora"):
        assert texts(write_rows(tmp_path / "a.jsonl", rows)) == ["fine"]
    assert "2 of 3 rows" in caplog.text
    assert "row 1" in caplog.text


def test_the_first_row_does_not_decide_which_column_is_the_text(tmp_path):
    rows = [{"id": "a", "body": None}, {"id": "b", "body": "fine"}]
    with pytest.raises(hlora.InputError, match=r"id, body.*--text-column"):
        texts(write_rows(tmp_path / "a.jsonl", rows))
    assert texts(tmp_path / "a.jsonl", "body") == ["fine"]
    rows = [{"id": 1, "body": None}, {"id": 2, "body": "fine"}]
    assert texts(write_rows(tmp_path / "b.jsonl", rows)) == ["fine"]
    with pytest.raises(hlora.InputError, match="row 2: 'text'"):
        texts(write_rows(tmp_path / "c.jsonl", [{"text": "fine"}, {"text": 3}]))


@pytest.mark.parametrize("nothing", [None, float("nan")])
@pytest.mark.parametrize("row", ["prompt", "completion", "choices"])
def test_an_empty_cell_of_a_task_is_refused_with_its_row(tmp_path, nothing, row):
    good = {"prompt": "1 + 1 =", "completion": " 2"}
    bad = {**good, row: nothing}
    if row == "choices":
        good = {"prompt": "p", "choices": ["a", "b"], "answer": 0}
        bad = {**good, "choices": ["a", nothing]}
    with pytest.raises(hlora.InputError, match="row 2"):
        load_task(str(write_rows(tmp_path / "t.jsonl", [good, bad])))


def test_an_empty_cell_that_no_template_asks_for_is_no_matter(tmp_path):
    row = {"prompt": "p", "completion": "c", "note": None}
    assert load_task(str(write_rows(tmp_path / "t.jsonl", [row]))).examples[0].prompt == "p"


def test_a_task_may_be_csv(tmp_path):
    (tmp_path / "t.csv").write_text("prompt,completion\n1 + 1 =, 2\n")
    assert load_task(str(tmp_path / "t.csv")).examples[0].choices == (" 2",)
    (tmp_path / "t.txt").write_text("prompt completion")
    with pytest.raises(hlora.InputError, match="no rows"):
        load_task(str(tmp_path / "t.txt"))


def test_a_limit_reads_a_limit(tmp_path, words, monkeypatch):
    """Four blocks of a large file are read, not the file."""
    path = tmp_path / "large.txt"
    with path.open("w") as file:
        file.truncate(3 << 30)  # a hole: reading it all would take minutes and gigabytes
        file.write("abcdefghijklmnop\n" * 100_000)
    assert blocks(Source.parse(str(path)), words, 8, limit=4).shape == (4, 8)
