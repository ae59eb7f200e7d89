"""Every block of the documentation does what the page says, on real servers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from relay import cli
from relay.overlays import compose_settings, type_settings
from tests.docs import sql_block
from tests.docs.conftest import MakeStage
from tests.docs.expectation import is_as_said
from tests.docs.page import (
    BACKGROUND,
    EVENTUALLY,
    EXECUTED_PAGES,
    FIGURES_VARY,
    NOT_EXECUTED,
    REPOSITORY,
    WHOLE_PAGES,
    Block,
    blocks,
    read,
)
from tests.servers.postgres import Database, PostgresServer

EXECUTED_LANGUAGES = ("sql", "console", "yaml")

# One line per block that nobody executes: adding one is a decision.
LEFT_OUT = {
    ("README.md", "scripts/demo    # PostgreSQL, NATS and the relay, with orders flowing through"),
    ("README.md", "pipx install 'pgtrickle-relay[nats]'"),
    (
        "docs/RELAY.md",
        "kafka-topics.sh --bootstrap-server broker:9092 --create --topic orders --pa",
    ),
    ("docs/RELAY.md", "usage: pgtrickle-relay [command] [flags] [key=value | +group=option ...]"),
}

ALL_BLOCKS = [block for page in EXECUTED_PAGES for block in blocks(page)]


@pytest.fixture(params=WHOLE_PAGES)
def page(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def page_database(page: str, any_postgres_server: PostgresServer) -> Iterator[Database]:
    """The README begins with an empty database, the others with a migrated one."""
    is_tour = page == "README.md"
    server = any_postgres_server
    with server.database() if is_tour else server.migrated_database() as database:
        yield database
    roles = re.findall(r"^create role (\w+)", read(page), re.MULTILINE)
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        for role in roles:
            connection.execute(sql.SQL("drop role if exists {}").format(sql.Identifier(role)))


async def test_a_page_does_what_it_says(
    page: str,
    page_database: Database,
    make_stage: MakeStage,
    servers_behind: Callable[[str], dict[str, str]],
) -> None:
    stage = await make_stage(page_database, servers_behind(read(page)))

    for block in blocks(page):
        await stage.perform(block)

    await stage.end_relays()


@pytest.mark.parametrize("block", ALL_BLOCKS, ids=lambda block: block.place)
def test_a_block_is_executed_or_says_why_not(block: Block) -> None:
    known = {"", EVENTUALLY, BACKGROUND, FIGURES_VARY}

    assert block.marker in known or block.marker.startswith(NOT_EXECUTED)
    assert (block.reason_not_executed is None) == (block.language in EXECUTED_LANGUAGES)
    assert block.reason_not_executed != ""


def test_the_blocks_that_are_not_executed_are_these() -> None:
    left_out = {
        (block.page, block.text.splitlines()[0])
        for block in ALL_BLOCKS
        if block.reason_not_executed is not None
    }

    assert {(page, line[:75].rstrip()) for page, line in left_out} == {
        (page, line[:75].rstrip()) for page, line in LEFT_OUT
    }


YAML_BLOCKS = [block for block in ALL_BLOCKS if block.language == "yaml"]


@pytest.mark.parametrize("block", YAML_BLOCKS, ids=lambda block: block.place)
def test_an_overlay_composes_to_valid_settings(block: Block, tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "documented.yaml").write_text(block.text)

    composed = compose_settings(["+env=documented"], config_dirs=[str(tmp_path)])

    assert type_settings(composed) != type_settings(compose_settings([]))


@pytest.mark.parametrize(
    "block", [block for block in ALL_BLOCKS if block.reason_not_executed], ids=lambda b: b.place
)
def test_a_command_that_is_not_executed_is_one_that_the_relay_understands(block: Block) -> None:
    text = block.text.replace("\\\n", " ")
    for line in re.findall(
        r"^(?:ExecStart|docker run).*?pgtrickle-relay\S* (.*)$", text, re.MULTILINE
    ):
        arguments = cli.parser().parse_intermixed_args(shlex.split(line))
        _, _, overrides = cli._told_apart(arguments.words)
        compose_settings(overrides)


@pytest.mark.parametrize("page", EXECUTED_PAGES)
def test_an_overlay_that_a_page_names_is_packaged(page: str) -> None:
    named = set(re.findall(r"`\+?((?:env|log|metrics|postgres|ui)=\w+)`", read(page)))

    packaged = {f"{path.parent.name}={path.stem}" for path in REPOSITORY.glob("conf/*/*.yaml")}

    assert named - {"env=shop"} <= packaged


def test_what_is_expected_may_hold_any_text_any_lines_and_any_figures() -> None:
    assert is_as_said("a…c\n…\nend", "abc\nx\ny\nend")
    assert is_as_said("a\n…", "a")
    assert is_as_said("p50 4.7 ms  of 10", "p50 12 ms of 3.5", figures_vary=True)
    assert not is_as_said("a…c", "abd")
    assert not is_as_said("a", "a\nb")
    assert not is_as_said("p50 4.7 ms", "p50 fast ms", figures_vary=True)


def test_a_statement_that_does_something_else_is_found(migrated_database: Database) -> None:
    with psycopg.connect(migrated_database.dsn, autocommit=True) as connection:
        right, wrong_row, wrong_error, no_error = sql_block.statements(
            "select 1;\n-- returns: 1\nselect ';', null;\n-- returns: 2\n"
            "select 1 / 0;\n-- error: RL001\nselect 1;\n-- error: 22012\n"
        )

        sql_block.run(connection, right)
        sql_block.run(connection, replace(wrong_row, rows=("; | null",)))
        sql_block.run(connection, replace(wrong_error, error="22012 division by zero"))
        for wrong in (wrong_row, wrong_error, no_error):
            with pytest.raises(AssertionError):
                sql_block.run(connection, wrong)
