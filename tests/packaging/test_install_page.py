"""What `docs/INSTALL.md` tells people to type is what there is."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

from relay import __version__, cli
from relay.overlays import compose_settings
from scripts import executable
from tests.docs.page import blocks, read
from tests.servers.process import REPOSITORY

PAGE = "docs/INSTALL.md"


def commands() -> list[str]:
    text = "\n".join(block.text for block in blocks(PAGE))
    return text.replace("\\\n", " ").splitlines()


def test_a_command_of_the_relay_is_one_that_it_understands() -> None:
    called = (
        r"(?:^docker run .*pgtrickle-relay:\S+|amd64/pgtrickle-relay|-m relay|^pgtrickle-relay) "
    )
    lines = [line for command in commands() for line in re.findall(rf"{called}(.+)", command)]

    assert len(lines) >= 5
    for line in lines:
        words = [word for word in shlex.split(line) if word != "--version"]
        arguments = cli.parser().parse_intermixed_args(words)
        _, _, overrides = cli._told_apart(arguments.words)
        compose_settings(overrides)


def test_files_extras_and_archives_that_the_page_names_exist() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]

    for name in re.findall(r"(?:deploy|locks|scripts)/[\w./-]*\w", read(PAGE)):
        assert (REPOSITORY / name).exists(), name
    for name in re.findall(r"pgtrickle-relay\[(\w+)\]", read(PAGE)):
        assert name in extras
    archives = set(re.findall(r"pgtrickle-relay-\d[\w.-]*?(?=\.tar|/)", read(PAGE)))
    systems, architectures = executable.SYSTEMS, executable.ARCHITECTURES
    assert archives <= {
        f"pgtrickle-relay-{__version__}-{system}-{architecture}"
        for system in systems.values()
        for architecture in architectures.values()
    }
    assert archives


def test_of_a_package_with_compiled_modules_everything_goes_into_an_executable(
    tmp_path: Path,
) -> None:
    for name in ("driver/__init__.py", "driver/wire/wire.cpython-313-x86.so", "driver/wire/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "__init__.py").touch()
    (tmp_path / "_single.abi3.so").touch()

    assert set(executable.modules_around_compiled(tmp_path)) == {
        *("driver", "driver.wire.wire", "driver.wire.x", "_single"),
    }
