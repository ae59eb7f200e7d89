"""`check_version_sync` finds every place whose version differs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.servers.process import REPOSITORY


@pytest.fixture(scope="module")
def check_version_sync() -> ModuleType:
    path = REPOSITORY / "scripts" / "check_version_sync.py"
    specification = importlib.util.spec_from_file_location("check_version_sync", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Its dataclass looks its own module up while it is being defined.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "check_version_sync", module)
        specification.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in which every place says 1.2.3."""
    write(tmp_path, "pyproject.toml", '[project]\nname = "x"\nversion = "1.2.3"\n')
    write(tmp_path, "relay/__init__.py", '"""The relay."""\n\n__version__ = "1.2.3"\n')
    write(tmp_path, "sql/migrations/pg_trickle--1.2.2.sql", "select 1;\n")
    write(tmp_path, "sql/migrations/pg_trickle--1.2.2--1.2.3.sql", "select 1;\n")
    write(
        tmp_path,
        "sql/functions/50_config.sql",
        "create or replace function @schema@.relay_schema_version()\n"
        "returns text\nlanguage sql\nimmutable\nas $$ select '1.2.3' $$;\n",
    )
    write(tmp_path, "CHANGELOG.md", "# Changelog\n\n## 1.2.3 (2026-01-01)\n\n## 1.2.2\n")
    write(tmp_path, "Dockerfile", "ARG VERSION=1.2.3\nFROM scratch\n")
    return tmp_path


def write(root: Path, name: str, content: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_agreeing_places_are_accepted(checkout: Path, check_version_sync: ModuleType) -> None:
    assert check_version_sync.disagreements(checkout) == []


@pytest.mark.parametrize(
    "name, content",
    [
        ("pyproject.toml", '[project]\nversion = "1.2.4"\n'),
        ("relay/__init__.py", '__version__ = "1.2.2"\n'),
        ("sql/migrations/pg_trickle--1.2.3--1.10.0.sql", "select 1;\n"),
        (
            "sql/functions/50_config.sql",
            "create or replace function @schema@.relay_schema_version() as $$ select '1.2.2' $$;",
        ),
        ("CHANGELOG.md", "## 1.3.0\n\n## 1.2.3\n"),
        ("Dockerfile", "ARG VERSION=1.2.2\n"),
        ("docs/RELAY.md", "docker run grove/pgtrickle-relay:1.2.2\n"),
        ("docs/INSTALL.md", "tar -xf pgtrickle-relay-1.2.2-linux-amd64.tar.gz\n"),
        ("docs/INSTALL.md", "pip install --no-deps pgtrickle-relay==1.2.2\n"),
        ("docs/INSTALL.md", "curl https://g/pgtrickle-relay/releases/download/v1.2.2/x\n"),
        ("docs/INSTALL.md", "pip install -r https://g/pgtrickle-relay/v1.2.2/locks/relay.txt\n"),
        ("docker-compose.yaml", "image: &image grove/pgtrickle-relay:1.2.2\n"),
        ("deploy/kubernetes/migrate.yaml", "name: pgtrickle-relay-migrate-1-2-2\n"),
        ("deploy/kubernetes/deployment.yaml", "app.kubernetes.io/version: 1.2.2\n"),
        ("SECURITY.md", "| 1.2.2, the newest | yes |\n"),
    ],
)
def test_one_place_that_differs_is_named(
    checkout: Path, check_version_sync: ModuleType, name: str, content: str
) -> None:
    write(checkout, name, content)

    assert check_version_sync.disagreements(checkout)


def test_a_place_that_lost_its_version_is_named(
    checkout: Path, check_version_sync: ModuleType
) -> None:
    write(checkout, "CHANGELOG.md", "# Changelog\n")

    assert check_version_sync.disagreements(checkout) == [
        "CHANGELOG.md: no version found, but pyproject.toml says 1.2.3"
    ]


def test_the_places_of_this_repository_agree(check_version_sync: ModuleType) -> None:
    assert check_version_sync.disagreements(REPOSITORY) == []
