"""General text from files, folders and data sets, packed into blocks."""

from pathlib import Path

import pytest
import torch

import hlora
from hlora.data import pythontext
from hlora.data import source as sourcing
from hlora.data.source import Source
from hlora.data.text import block_rows, blocks, mix
from tests.tiny import tokenizer, write_rows, write_text

GENERAL = Path(__file__).parents[2] / "shared" / "data" / "general"


@pytest.fixture(scope="module")
def words():
    return tokenizer()


def read(spec, words, size=8, column=None, limit=None):
    return blocks(Source.parse(str(spec), column), words, size, limit)


def decoded(rows, words):
    return words.decode(rows.flatten().tolist())


def test_text_is_packed_without_padding(tmp_path, words):
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrst")
    rows = read(tmp_path / "a.txt", words)
    assert rows.shape == (2, 8)
    assert decoded(rows, words) == "abcdefghijklmnop"
    assert rows.dtype == torch.int64


def test_documents_are_parted_by_the_end_token(tmp_path, words):
    write_rows(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "defg"}])
    assert read(tmp_path / "a.jsonl", words).tolist() == [
        [*words("abc")["input_ids"], words.eos_token_id, *words("defg")["input_ids"]]
    ]


@pytest.mark.parametrize("limit", [None, 2])
def test_one_block_a_document(tmp_path, words, limit):
    texts = ["abcdefghijklmnop", "abc", "qrstuvwx", "123456789"]
    write_rows(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    source = Source.parse(str(tmp_path / "a.jsonl"))
    rows = blocks(source, words, 8, limit, per_document=True)
    assert [words.decode(r) for r in rows] == ["abcdefgh", "qrstuvwx", "12345678"][:limit]


def test_jsonl_and_parquet_give_the_same(tmp_path, words):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"id": i, "text": f"document {i} of a few"} for i in range(5)]
    write_rows(tmp_path / "a.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert torch.equal(read(tmp_path / "a.jsonl", words), read(tmp_path / "a.parquet", words))


def test_a_folder_is_read_in_order_and_its_other_files_are_not(tmp_path, words):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("2222222")
    (tmp_path / "a.txt").write_text("1111111")
    (tmp_path / "sub" / "c.md").write_text("3333333")
    (tmp_path / "d.bin").write_bytes(b"\x00" * 99)
    assert words.decode(read(tmp_path, words)[:, 0]) == "123"


def test_a_data_set_goes_through_the_hub_s_loader(tmp_path, words):
    """The hub's route, on a data set folder on disk."""
    pytest.importorskip("datasets")
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [{"content": "abcdefg"}, {"content": "hijklmn"}])
    rows = read(f"hub:{folder}", words, column="content")
    assert decoded(rows[:, :7], words) == "abcdefghijklmn"
    write_rows(folder / "test.jsonl", [{"content": "1234567"}])
    assert decoded(read(f"hub:{folder}@test", words)[:, :7], words) == "1234567"


def test_a_hub_data_set_that_is_not_there_is_one_sentence():
    pytest.importorskip("datasets")
    with pytest.raises(hlora.InputError, match="nobody/nothing"):
        next(Source.parse("nobody/nothing").documents())


@pytest.mark.parametrize(
    ("spec", "name", "where", "hub"),
    [
        ("EleutherAI/pile", "pile", "EleutherAI/pile", True),
        ("wikitext:wikitext-2-v1@test", "wikitext:wikitext-2-v1@test", None, True),
        ("prose=EleutherAI/pile:all", "prose", "EleutherAI/pile:all", True),
    ],
)
def test_hub_names(spec, name, where, hub):
    source = Source.parse(spec)
    assert (source.name, source.where, source.hub) == (name, where or spec, hub)


def test_a_kind_is_named_after_its_file_without_the_split(tmp_path):
    write_text(tmp_path / "wiki.train.txt")
    assert Source.parse(str(tmp_path / "wiki.train.txt")).name == "wiki"
    assert Source.parse(f"w={tmp_path / 'wiki.train.txt'}").name == "w"


@pytest.mark.parametrize("missing", ["missing.txt", "/no/such/folder/at/all", "a b"])
def test_a_missing_path_is_named(missing):
    with pytest.raises(hlora.InputError, match=missing):
        Source.parse(missing)


def test_the_text_column_is_found_or_asked_for(tmp_path, words):
    path = tmp_path / "a.jsonl"
    write_rows(path, [{"id": 1, "body": "abcdefgh"}])
    assert len(read(path, words)) == 1
    write_rows(path, [{"title": "x", "body": "abcdefgh"}])
    with pytest.raises(hlora.InputError, match=r"title, body.*--text-column"):
        read(path, words)
    assert len(read(path, words, column="body")) == 1
    with pytest.raises(hlora.InputError, match=r"'bodi'.*title, body"):
        read(path, words, column="bodi")


def test_empty_short_and_broken_files_are_told_apart(tmp_path, words):
    path = tmp_path / "a.txt"
    path.write_text(" \n")
    with pytest.raises(hlora.InputError, match=r"a\.txt.*empty"):
        read(path, words)
    path.write_text("abc")
    with pytest.raises(hlora.InputError, match=r"4 tokens.*block of 8"):
        read(path, words)
    path.write_bytes(b"abc\xff\xfe")
    with pytest.raises(hlora.InputError, match=r"UTF-8.*byte 3"):
        read(path, words)
    rows = tmp_path / "b.jsonl"
    rows.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(hlora.InputError, match=r"b\.jsonl, line 2"):
        read(rows, words)
    rows.write_text("[1]\n")
    with pytest.raises(hlora.InputError, match=r"row 1.*object"):
        read(rows, words)
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(hlora.InputError, match=r"c\.parquet"):
        read(tmp_path / "c.parquet", words)
    (tmp_path / "empty").mkdir()
    with pytest.raises(hlora.InputError, match="empty"):
        read(tmp_path / "empty", words)


def test_a_limit_stops_reading(tmp_path, words):
    def endless():
        while True:
            yield sourcing.Document("here", iter(["abcdefghijklmnop"]))

    source = Source("endless", "nowhere")
    object.__setattr__(source, "documents", endless)
    assert blocks(source, words, 8, limit=3).shape == (3, 8)


def test_long_documents_are_cut_for_the_tokenizer_only(words, monkeypatch, tmp_path):
    path = write_text(tmp_path / "a.txt", count=200)
    whole = read(path, words)
    monkeypatch.setattr(sourcing, "PIECE", 16)
    assert torch.equal(read(path, words), whole)


def kinds(**sizes):
    return {n: torch.full((size, 4), i) for i, (n, size) in enumerate(sizes.items())}


def test_weights_are_shares_and_no_block_comes_twice():
    mixed = mix(kinds(a=100, b=100), [3, 1], None)
    assert [(mixed[:, 0] == i).sum().item() for i in (0, 1)] == [100, 33]
    limited = mix(kinds(a=100, b=100), [3, 1], 40)
    assert [(limited[:, 0] == i).sum().item() for i in (0, 1)] == [30, 10]
    assert len(mix(kinds(a=7, b=5), None, None)) == 12


@pytest.mark.parametrize(
    ("weights", "message"), [([1], "--text-weights.*2 kinds"), ([1, 0], "--text-weights.*positive")]
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(hlora.InputError, match=message):
        mix(kinds(a=3, b=3), weights, None)


def test_real_text_is_packed_whole(words):
    if not GENERAL.is_dir():
        pytest.skip(f"{GENERAL} is not here")
    path = GENERAL / "wiki.test.txt"
    rows = read(path, words, 128)
    assert decoded(rows, words) == path.read_bytes()[: rows.numel()].decode("utf-8", "ignore")


def test_the_data_set_for_trainer_has_every_token_as_a_label():
    row = block_rows(torch.arange(12).reshape(3, 4))[1]
    assert row["input_ids"].tolist() == row["labels"].tolist() == [4, 5, 6, 7]


def test_python_comes_with_text_of_its_own():
    for kind in pythontext.KINDS:
        train, test = (pythontext.python_text(kind, split) for split in pythontext.SPLITS)
        assert len(train) >= len(test) > 50_000
        paragraphs = {p for p in train.split("\n\n") if len(p) > 80}
        shared = [p for p in test.split("\n\n") if p in paragraphs]
        assert len(shared) <= (0 if kind != "code" else 5)
    source = Source.parse("python-code@test")
    assert (source.name, source.hub) == ("python-code", False)
    [document] = source.documents()
    assert "".join(document.text) == pythontext.python_text("code", "test")


@pytest.mark.parametrize("where", ["python-cod", "python-code@dev"])
def test_misspelt_python_text_is_refused(where):
    with pytest.raises(hlora.InputError, match="python-docs"):
        Source.parse(where)


def test_columns_may_be_joined(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"q": "one?", "a": "two.", "n": "3"}])
    [document] = Source.parse(f"{path}#q+a").documents()
    assert "".join(document.text) == "one?\ntwo."
    with pytest.raises(hlora.InputError, match=r"'q\+b'.*q, a, n"):
        list(Source.parse(f"{path}#q+b").documents())
    assert Source.parse("owner/name:config@split#q+a").column == "q+a"
