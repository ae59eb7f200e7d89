"""Every section of the patterns does what it says, and fails as it says.

How a section is executed: a fresh database on the newest PostgreSQL, the blocks above the page's
first section, then its own, as on every page (`tests.docs`); then each of its tables of troubles
(`tests.docs.trouble`). Sections know nothing of each other.

To add a backend, write its section, with an example and a table of troubles for each direction.
Addresses that the page did not have yet are a line in `ADDRESSES` each, with a fixture for the
server behind it (`tests.docs.conftest`): ``localhost:PORT`` for the one of the example,
``NAME.internal:PORT`` for one that asks for a password, ``localhost:OTHER`` as `FREE_PORT` for one
that is not there. ``${env:RELAY_WRONG}`` is a secret that no server accepts. What a page shows as
output is compared; a command that a machine may lack is a few lines of Python instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest

from relay.registry import SINKS, SOURCES
from tests.docs.conftest import MakeStage
from tests.docs.page import SECTIONED_PAGE, blocks, read
from tests.docs.trouble import show_troubles, trouble_tables
from tests.servers.postgres import PostgresServer

BLOCKS = blocks(SECTIONED_PAGE)
SECTIONS = list(dict.fromkeys(block.section for block in BLOCKS if block.section))
TROUBLES = trouble_tables(SECTIONED_PAGE)

# Nothing that somebody writes about these leads anywhere.
WITHOUT_TROUBLES = {"stdout", "stdin"}


@pytest.mark.parametrize("section", SECTIONS)
async def test_a_section_does_and_fails_as_it_says(
    section: str,
    postgres_server: PostgresServer,
    make_stage: MakeStage,
    servers_behind: Callable[[str], dict[str, str]],
) -> None:
    with postgres_server.migrated_database() as database:
        stage = await make_stage(database, servers_behind(_text_of(section)))

        for block in BLOCKS:
            if block.section in ("", section):
                await stage.perform(block)
        await stage.end_relays()

        tables = [table for table in TROUBLES if table.section == section]
        if tables:
            await show_troubles(stage, tables)


@pytest.mark.parametrize("direction, types", [("outbox", SINKS), ("inbox", SOURCES)])
def test_every_backend_has_an_example_and_its_troubles(
    direction: str, types: Mapping[str, str]
) -> None:
    examples: dict[str, set[str]] = {}
    for block in BLOCKS:
        calls = rf"set_relay_{direction}\(\s*'([\w-]+)',(.*?)\);"
        for name, keys in re.findall(calls, block.text, re.DOTALL):
            for type_ in re.findall(r'"type": "([\w-]+)"', keys):
                examples.setdefault(type_, set()).add(name)
    with_troubles = {table.pipeline for table in TROUBLES}

    assert types.keys() - {"outbox"} <= examples.keys(), "write a section in docs/PATTERNS.md"
    untroubled = [type_ for type_, names in examples.items() if not names & with_troubles]
    assert set(untroubled) <= WITHOUT_TROUBLES, "add a table: <!-- troubles of NAME -->"


def test_a_table_of_troubles_is_read() -> None:
    table = next(table for table in TROUBLES if table.pipeline == "orders-to-nats")

    assert table.section == "NATS JetStream"
    assert table.troubles[1].keys == {"url": "nats://nats.invalid:4222"}
    assert table.troubles[1].said.startswith("connecting to NATS at nats.invalid:4222: ")
    assert table.troubles[-1].keys["stream"] is None


def _text_of(section: str) -> str:
    """The page's text above its first section, and that of this one."""
    head, *parts = re.split(r"^## ", read(SECTIONED_PAGE), flags=re.MULTILINE)
    (own,) = (part for part in parts if part.partition("\n")[0] == section)
    return head + own
