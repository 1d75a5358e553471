"""Adapters and importance by name on a hub, tried against a server of our own."""

import json
import shutil

import pytest

import hlora
from hlora.cli import main as cli
from hlora.core import store
from hlora.hf import hub as ours
from tests.hub import serving
from tests.tiny import questions, write_rows, write_text

TOKEN = "hf_aVerySecretTokenIndeed"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that huggingface_hub takes for the real one."""
    from huggingface_hub import constants, file_download

    with serving() as (held, address):
        held.address = address
        for name, value in {
            "ENDPOINT": address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
            "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
            if hasattr(file_download, name):  # before huggingface_hub 1
                monkeypatch.setattr(file_download, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        ours._resolved.cache_clear()
        yield held
        ours._resolved.cache_clear()


@pytest.fixture
def place(tmp_path, tiny, monkeypatch):
    """A folder of someone, in which commands run."""
    home = tmp_path / "jane"
    home.mkdir()
    monkeypatch.chdir(home)
    write_text(home / "a.txt")
    write_rows(home / "q.jsonl", questions())
    shutil.copytree(tiny, home / "model")
    model = ["--model", str(home / "model"), "--device", "cpu", "--dtype", "fp32"]

    class Place:
        folder = home

        def record(self, *more):
            return cli.main(
                ["record", *model, "--kind", "factored", "--text", str(home / "a.txt"),
                 "--output", str(home / "nu"),
                 "--block-size", "32", "--max-steps", "2", "--batch-size", "4", *more]
            )  # fmt: skip

        def tune(self, *more, output="mu"):
            return cli.main(
                ["tune", *model, "--task", str(home / "q.jsonl"), "--output", str(home / output),
                 "--max-steps", "2", "--batch-size", "4", "--save-steps", "1", *more]
            )  # fmt: skip

        def run(self, command, *more):
            return cli.main([command, *model, *more])

    return Place()


def test_importance_and_adapters_go_up_and_come_back(hub, place, capsys):
    assert place.record("--push-to-hub", "me/nu") == 0
    assert set(hub.files("me/nu")) - {".gitattributes"} == {
        p.name for p in (place.folder / "nu").iterdir()
    }
    assert hub.private["me/nu"]
    assert place.tune("--importance", "me/nu", "--push-to-hub", "me/mu", "--public") == 0
    assert not hub.private["me/mu"]
    noted = json.loads((place.folder / "mu" / "tune.json").read_text())["settings"]
    assert noted["importance"] == [f"me/nu@{hub.sha('me/nu', 'main')}"]
    card = hub.files("me/mu")["README.md"].decode()
    assert noted["importance"][0] in card
    assert place.tune("--importance", str(place.folder / "nu"), output="same") == 0
    same = [f / "adapter_model.safetensors" for f in (place.folder / n for n in ("mu", "same"))]
    assert same[0].read_bytes() == same[1].read_bytes()
    text = ["--text", str(place.folder / "a.txt"), "--block-size", "32"]
    assert place.run("eval", "--adapter", "me/mu", *text) == 0
    back = ["--adapter", "me/mu", "--output", "back", "--forget-at-most", "1"]
    assert place.run("rewind", *back, *text, "--push-to-hub", "me/back") == 0
    assert "me/mu@" in (place.folder / "back" / "README.md").read_text()
    assert set(hub.files("me/back")) - {".gitattributes"} == {
        p.name for p in (place.folder / "back").iterdir()
    }
    assert cli.main(["merge", "--model", "model", "--adapter", "me/mu", "--output", "out"]) == 0
    assert f"Bearer {TOKEN}" in hub.tokens
    said = capsys.readouterr()
    written = [p for p in place.folder.rglob("*") if p.is_file()]
    assert TOKEN not in said.out + said.err
    assert not [p for p in written if TOKEN.encode() in p.read_bytes()]
    for name in ("me/nu", "me/mu", "me/back"):
        for file, content in hub.files(name).items():
            assert b"jane" not in content, (name, file)


def test_what_a_domain_recorded_goes_up_with_its_adapter(hub, place):
    """One name is then the adapter, and the importance that the next domain is held to."""
    assert place.tune("--record", "own", "--push-to-hub", "me/a") == 0
    assert {"tune.json", "importance.json", "importance.safetensors"} <= set(hub.files("me/a"))
    assert hub.files("me/a")["README.md"] == (place.folder / "mu" / "README.md").read_bytes()
    text = ["--text", str(place.folder / "a.txt"), "--block-size", "32"]
    assert place.run("eval", "--adapter", "me/a", *text) == 0
    assert place.tune("--importance", "me/a", output="b") == 0
    assert place.tune("--importance", "own", output="c") == 0
    same = [place.folder / n / "adapter_model.safetensors" for n in ("b", "c")]
    assert same[0].read_bytes() == same[1].read_bytes()


def test_a_revision_is_pinned(hub, place):
    assert place.record("--push-to-hub", "me/nu") == 0
    first = hub.sha("me/nu", "main")
    assert place.record("--seed", "1", "--overwrite", "--push-to-hub", "me/nu") == 0
    assert hub.sha("me/nu", "main") != first
    before = store.load(ours.located(f"me/nu@{first}"))
    after = store.load(ours.located("me/nu"))
    assert before.info["settings"]["seed"] == 0
    assert after.info["settings"]["seed"] == 1
    assert hlora.Penalty(f"me/nu@{first}").stored.info["settings"]["seed"] == 0
    hub.commit("me/nu", {"x": b"pushed meanwhile"})
    assert ours.pinned("me/nu") == f"me/nu@{after.folder.name}"  # within one command


def test_a_failed_upload_leaves_the_result_and_one_error(hub, place, capsys):
    hub.refuses = True
    assert place.tune("--push-to-hub", "me/mu") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "me/mu" in err
    assert str(place.folder / "mu") in err
    assert "--resume" in err
    before = (place.folder / "mu" / "adapter_model.safetensors").read_bytes()
    hub.refuses = False
    assert place.tune("--push-to-hub", "me/mu", "--resume") == 0
    assert hub.files("me/mu")["adapter_model.safetensors"] == before


def test_what_cannot_be_pushed_is_refused_before_the_work(hub, place, monkeypatch, capsys):
    assert place.tune("--push-to-hub", "only-a-name") == 2
    assert "OWNER/NAME" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert place.record("--push-to-hub", "me/nu") == 2
    assert "login" in capsys.readouterr().err
    assert not (place.folder / "nu").exists()
    assert not hub.asked


def test_what_is_not_on_the_hub_or_damaged_there_is_one_error(hub, place, capsys):
    assert place.tune("--importance", "me/nothing") == 2
    err = capsys.readouterr().err
    assert "me/nothing" in err
    assert err.count("\n") == 1
    assert place.record("--push-to-hub", "me/nu") == 0
    hub.commit("me/nu", {"importance.safetensors": b"x"})
    assert place.tune("--importance", "me/nu") == 2
    assert "importance.safetensors" in capsys.readouterr().err
    hub.commit("me/pickle", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    assert place.run("eval", "--adapter", "me/pickle", "--text", "a.txt", "--block-size", "32") == 2
    assert "safetensors" in capsys.readouterr().err
    assert not any("adapter_model.bin" in a for a in hub.asked)


@pytest.mark.parametrize(
    ("value", "clean"),
    [
        ("/home/jane/x/nu", "nu"), ("wiki=/home/jane/w.txt", "wiki=w.txt"), ("~/nu/", "nu"),
        ("C:\\Users\\jane\\a.txt", "a.txt"), ("data/a.txt", "data/a.txt"), ("a = b", "a = b"),
        ("owner/name@main", "owner/name@main"), ("https://x.org/y", "https://x.org/y"),
        ({"a": ["/home/jane/b", 3]}, {"a": ["b", 3]}), (r"model\.layers\.\d", r"model\.layers\.\d"),
    ],
)  # fmt: skip
def test_places_are_cut(value, clean):
    assert ours.without_places(value) == clean
