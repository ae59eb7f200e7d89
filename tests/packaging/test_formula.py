"""The formula is made of the locked files, and keeps what `brew audit` and `brew style` ask for.

The rules are of https://docs.brew.sh/Formula-Cookbook and https://docs.brew.sh/Python-for-Formula-Authors.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from relay import __version__
from scripts import formula

# In this order, says its cop of components.
COMPONENTS = (
    *("include", "desc", "homepage", "url", "sha256", "license", "depends_on", "resource"),
    *("def install", "service do", "test do"),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dist") / f"pgtrickle_relay-{__version__}.tar.gz"
    path.write_bytes(b"a source distribution")
    return path


@pytest.fixture(scope="module")
def text(source: Path) -> str:
    return formula.formula(source)


def test_a_formula_says_what_homebrew_asks_for(text: str, source: Path) -> None:
    stated = dict(re.findall(r'^  (desc|homepage|url|sha256|license) "(.*)"$', text, re.MULTILINE))

    assert text.startswith("class PgtrickleRelay < Formula\n")
    assert text.endswith("end\n")
    assert not re.search(r"[ \t]$|\t|\n\n\n", text, re.MULTILINE)
    assert stated["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert stated["license"] == "Apache-2.0"
    assert stated["homepage"].startswith("https://")
    assert stated["url"].startswith("https://")
    assert f"/v{__version__}/pgtrickle_relay-{__version__}.tar.gz" in stated["url"]
    assert len(stated["desc"]) <= 80
    assert re.match(r"(?!(?:An?|The|Pgtrickle) )[A-Z]", stated["desc"])
    assert not stated["desc"].endswith(".")
    places = [text.index(f"\n  {component}") for component in COMPONENTS]
    assert places == sorted(places)
    if (ruby := shutil.which("ruby")) is not None:
        subprocess.run([ruby, "-c"], input=text, text=True, check=True, capture_output=True)


def test_a_formula_brings_each_locked_dependency_as_its_source(text: str) -> None:
    locked = {
        Requirement(line.removesuffix("\\").strip()).name
        for line in formula.LOCK.read_text().splitlines()
        if line and line[0] not in "# "
    }
    found = re.findall(
        r'  resource "(\S+)" do\n    url "https://\S+/\S+\.tar\.gz"\n    sha256 "([0-9a-f]{64})"\n',
        text,
    )
    depended = re.findall(r'^  depends_on "(\S+?)"(?: => :build)?$', text, re.MULTILINE)

    names = [name for name, _ in found]
    assert names == sorted(names)
    assert {*names, *formula.FORMULAE} == locked
    assert set(formula.FORMULAE.values()) <= set(depended)
    assert depended == ["rust", *sorted(formula.DEPENDENCIES)]


def test_a_source_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is not the source of"):
        formula.formula(tmp_path / "pgtrickle_relay-0.1.0.tar.gz")
