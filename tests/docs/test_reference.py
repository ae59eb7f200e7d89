"""The reference is complete, up to date, and names nothing that is not there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import psycopg
import pytest

from relay.catalog import CONFIG_CHANNEL
from relay.events import PipelineState
from relay.metrics import METRICS, PREFIX
from relay.options import known_keys
from relay.registry import EXTRAS, SINKS, SOURCES
from relay.settings import Settings
from tests.docs.page import EXECUTED_PAGES, REPOSITORY, anchors, links, prose, read
from tests.servers.postgres import Database

PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for pattern in ("*.md", "docs/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
DOCS = REPOSITORY / "scripts" / "docs.py"


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    """The generator as a module."""
    specification = importlib.util.spec_from_file_location("relay_docs", DOCS)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["relay_docs"] = module
    specification.loader.exec_module(module)
    return module


def test_the_generated_parts_are_up_to_date() -> None:
    check = subprocess.run(
        [sys.executable, DOCS, "--check"], capture_output=True, text=True, check=False
    )

    assert check.returncode == 0, check.stderr


def test_every_generated_part_stands_in_some_page(docs: ModuleType) -> None:
    written = {
        name
        for page in docs.GENERATED
        for name in re.findall(r"<!-- generated: ([\w-]+) -->", read(page))
    }

    assert written == set(docs.PARTS)


def test_a_stale_part_is_written_again_and_a_part_that_nobody_makes_is_refused(
    docs: ModuleType,
) -> None:
    stale = "a\n<!-- generated: envelope -->\nold\n<!-- end: envelope -->\nb\n"

    fresh = docs.regenerated(stale)

    assert "old" not in fresh
    assert "`dedup_key`" in fresh
    assert docs.regenerated(fresh) == fresh
    with pytest.raises(docs.Unexplained):
        docs.regenerated(stale.replace("envelope", "nobody"))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    broken = []
    for link in links(page):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        path = (REPOSITORY / page).parent / target if target else REPOSITORY / page
        named = str(path.resolve().relative_to(REPOSITORY))
        is_there = path.exists() and (not anchor or anchor in anchors(named))
        if not is_there:
            broken.append(link)

    assert broken == []


def test_the_table_of_contents_leads_to_every_page() -> None:
    listed = {(REPOSITORY / "docs" / link).resolve() for link in links("docs/README.md")}

    assert set(REPOSITORY.glob("docs/**/*.md")) - listed == {REPOSITORY / "docs" / "README.md"}


def test_a_page_opens_with_what_it_is_for() -> None:
    for path in REPOSITORY.glob("docs/*.md"):
        title, opening = [line for line in path.read_text().splitlines() if line][:2]

        assert title.startswith("# "), path
        assert re.match(r"[A-Z][a-z]", opening), path


def test_every_state_has_a_runbook() -> None:
    headings = set(re.findall(r"^### (\w+)$", read("docs/OPERATIONS.md"), re.MULTILINE))

    assert {state.value for state in PipelineState} <= headings


def test_every_error_code_of_the_sql_is_explained_and_no_other() -> None:
    raised = {
        code
        for path in REPOSITORY.glob("sql/functions/*.sql")
        for code in re.findall(r"'(RL\d{3})'", path.read_text())
    }

    explained = set(re.findall(r"^\| `(RL\d{3})` \|", read("docs/SQL.md"), re.MULTILINE))

    assert explained == raised


@pytest.mark.parametrize("page", EXECUTED_PAGES)
def test_every_metric_that_a_page_names_exists(page: str) -> None:
    known = {f"{PREFIX}{spec.name}" for spec in METRICS} | {CONFIG_CHANNEL}

    named = set(re.findall(rf"\b{PREFIX}[a-z_]+\b", read(page)))

    assert named <= known


@pytest.mark.parametrize("page", EXECUTED_PAGES)
def test_every_setting_that_a_page_names_exists(page: str) -> None:
    known = set(known_keys(Settings))

    named = set(
        re.findall(r"`((?:postgres|log|metrics|ui|secrets|files|relay)\.[a-z_]+)`", prose(page))
    )

    assert named <= known


def test_the_backends_that_are_there_are_those_of_the_table() -> None:
    table = re.search(r"\| type \| sink \|.*?\n\n", read("docs/RELAY.md"), re.DOTALL)
    assert table is not None
    rows = {
        name: line for line in table[0].splitlines() for name in re.findall(r"`([\w-]+)`", line)
    }

    assert set(rows) == {*SINKS, *SOURCES, *EXTRAS.values()}


def test_every_function_that_people_may_call_is_in_the_reference(
    docs: ModuleType, migrated_database: Database
) -> None:
    with psycopg.connect(migrated_database.dsn) as connection:
        callable_names = {
            name
            for (name,) in connection.execute(
                "select distinct p.proname::text from pg_proc as p"
                " where p.pronamespace = 'pgtrickle'::regnamespace and p.prokind = 'f'"
                " and p.proname not like 'relay\\_%' and p.proname not like '%\\_of'"
                " and has_function_privilege('pgtrickle_relay', p.oid, 'execute')"
            )
        }

    documented = {name for names in docs.SQL_TOPICS.values() for name in names}

    assert callable_names <= documented


def test_the_reference_says_of_each_function_what_the_database_says(
    docs: ModuleType, migrated_database: Database
) -> None:
    with psycopg.connect(migrated_database.dsn) as connection:
        installed = {
            (name, _as_in_files(arguments)): (comment, is_definer)
            for name, arguments, comment, is_definer in connection.execute(
                "select p.proname::text, pg_get_function_identity_arguments(p.oid),"
                " obj_description(p.oid, 'pg_proc'), p.prosecdef"
                " from pg_proc as p"
                " where p.pronamespace = 'pgtrickle'::regnamespace and p.prokind = 'f'"
            )
        }

    read_from_files = {
        (function.name, _identity(function.arguments)): (function.comment, function.is_definer)
        for function in docs.sql_functions()
    }

    assert read_from_files == installed


def _identity(arguments: tuple[str, ...]) -> str:
    named = [argument.partition(" default ")[0].replace('"', "") for argument in arguments]
    return ", ".join(named)


def _as_in_files(arguments: str) -> str:
    bare = arguments.replace('"', "").replace("timestamp with time zone", "timestamptz")
    return re.sub(r"\b(VARIADIC|OUT)\b", lambda found: found[0].lower(), bare)


def test_pages_speak_of_the_version_of_this_program() -> None:
    version = re.search(
        r'^version = "(.*)"', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert version is not None

    named = {
        found
        for page in ("README.md", "docs/INSTALL.md")
        for found in re.findall(
            r"pgtrickle-relay:(\d+\.\d+\.\d+)", Path(REPOSITORY, page).read_text()
        )
    }

    assert named == {version[1]}
