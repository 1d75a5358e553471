"""The wheel and the sdist: what is in them, and that the wheel alone works outside a checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement

import hlora

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta as b; b.build_{}(sys.argv[1])"


def run(*words, cwd, **settings):
    done = subprocess.run(
        [str(w) for w in words], cwd=cwd, capture_output=True, text=True, check=False, **settings
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(what, source, into):
    run(sys.executable, "-c", BUILD.format(what), into, cwd=source)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with both, and a copy of what they were built from."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for what in ("wheel", "sdist"):
        build(what, source, folder)
    return folder


def wheel_of(folder):
    [path] = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = set(zipfile.ZipFile(wheel_of(built)).namelist())
    ours = {n for n in names if n.startswith("hlora/")}
    source = ROOT / "src"
    kept = {
        str(p.relative_to(source))
        for p in (source / "hlora").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert ours == kept
    assert {n.split("/")[0] for n in names - ours} == {f"hlora-{hlora.__version__}.dist-info"}
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_what_the_package_says_of_itself_is_valid(built):
    archive = zipfile.ZipFile(wheel_of(built))
    [name] = [n for n in archive.namelist() if n.endswith("/METADATA")]
    raw = archive.read(name)
    found = Metadata.from_email(raw, validate=True)  # as an index does
    assert str(found.version) == hlora.__version__
    assert found.license_expression == "Apache-2.0"
    assert found.description_content_type.startswith("text/markdown")
    assert BytesParser().parsebytes(raw).get_payload().lstrip().startswith("# hlora")
    assert {"trl", "quant", "docs", "data", "eval", "report", "demo", "dev"} <= set(
        found.provides_extra
    )
    wanted = {r.name for r in map(Requirement, map(str, found.requires_dist)) if r.marker is None}
    assert {"torch", "transformers", "peft", "safetensors", "accelerate"} <= wanted


def test_the_sdist_builds_the_same_wheel(built, tmp_path):
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= {
        p.name for p in source.iterdir()
    }
    build("wheel", source, tmp_path)
    a, b = (zipfile.ZipFile(wheel_of(f)) for f in (built, tmp_path))
    assert {n: a.read(n) for n in a.namelist()} == {n: b.read(n) for n in b.namelist()}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A fresh environment with the wheel, which borrows all other packages from this one."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
        "--no-index", wheel_of(built), cwd=folder,
    )  # fmt: skip
    [site] = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def outside(installed, *words, cwd):
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return run(installed / "bin" / words[0], *words[1:], cwd=cwd, env=kept)


@pytest.mark.skipif(os.name == "nt", reason="bin/ is Scripts/ there")
def test_the_wheel_alone_runs_outside_a_checkout(installed, tiny, tmp_path):
    where = outside(installed, "python", "-c", "import hlora; print(hlora.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed)
    said = outside(installed, "hlora", "--help", cwd=tmp_path)
    assert "usage: hlora COMMAND" in said
    assert "--quick" in outside(installed, "hlora", "demo", "--help", cwd=tmp_path)
    assert outside(installed, "hlora", "--version", cwd=tmp_path) == f"hlora {hlora.__version__}\n"
    pytest.importorskip("mendeleev")
    pytest.importorskip("matplotlib")
    outside(installed, "hlora", "demo", "--quick", "--model", tiny, "--output", "d", cwd=tmp_path)
    assert (tmp_path / "d" / "report.html").is_file()
