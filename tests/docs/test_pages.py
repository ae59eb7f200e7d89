"""Every block of the documentation does what the page says, on real servers."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import psycopg
import pytest
import yaml
from psycopg import sql

from relay import cli
from relay.cli import compose_settings, type_settings
from relay.metrics import METRICS, PREFIX
from tests.docs import sql_block
from tests.docs.console_block import Command, Shell, commands
from tests.docs.expectation import is_as_said
from tests.docs.page import (
    BACKGROUND,
    EVENTUALLY,
    EXECUTED_PAGES,
    FIGURES_VARY,
    NOT_EXECUTED,
    REPOSITORY,
    Block,
    blocks,
    read,
)
from tests.servers.finding import LOOPBACK, free_port
from tests.servers.nats import NatsServer
from tests.servers.postgres import Database, PostgresServer
from tests.servers.process import RelayProcess

EVENTUALLY_S = 20.0

EXECUTED_LANGUAGES = ("sql", "console", "yaml")

# One line per block that nobody executes: adding one is a decision.
LEFT_OUT = {
    ("README.md", "scripts/demo    # PostgreSQL, NATS and the relay, with orders flowing through"),
    ("README.md", "pipx install 'pgtrickle-relay[nats]'"),
    ("docs/RELAY.md", "usage: pgtrickle-relay [command] [flags] [key=value | +group=option ...]"),
    ("docs/OPERATIONS.md", "# /etc/systemd/system/pgtrickle-relay.service"),
    ("docs/OPERATIONS.md", "docker build -t grove/pgtrickle-relay:0.29.0 ."),
}

ALL_BLOCKS = [block for page in EXECUTED_PAGES for block in blocks(page)]


@dataclass
class Stage:
    """Where one page is executed: its database, its shell, its relay."""

    database: Database
    connection: psycopg.Connection[tuple[object, ...]]
    shell: Shell
    start_relay: Callable[..., Awaitable[RelayProcess]]
    substitutions: dict[str, str]
    relays: list[RelayProcess] = field(default_factory=list)

    def here(self, text: str) -> str:
        """The text with the servers and directories of this stage for those of the page."""
        for written, actual in self.substitutions.items():
            text = text.replace(written, actual)
        return text

    async def execute(self, block: Block) -> None:
        if block.language == "sql":
            for statement in sql_block.statements(self.here(block.text)):
                await asyncio.to_thread(sql_block.run, self.connection, statement)
            return
        for command in commands(self.here(block.text)):
            if block.marker == BACKGROUND:
                await self._start(command)
            else:
                await self.shell.run(command, figures_vary=block.marker == FIGURES_VARY)

    async def _start(self, command: Command) -> None:
        program, *arguments = shlex.split(command.text)
        assert program == "pgtrickle-relay", command.text
        relay = await self.start_relay(*arguments, dsn=self.database.dsn)
        await relay.wait_until_ready()
        self.relays.append(relay)
        self.substitutions["localhost:9090"] = relay.http_url.removeprefix("http://")


@pytest.fixture(params=EXECUTED_PAGES)
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


@pytest.fixture
async def stage(
    page_database: Database,
    database: Database,
    nats_server_with: Callable[..., NatsServer],
    relay_process: Callable[..., Awaitable[RelayProcess]],
    tmp_path: Path,
) -> AsyncIterator[Stage]:
    # Streams of the pages cover broad subjects: a server of its own keeps them apart.
    nats_server = await asyncio.to_thread(nats_server_with, "")
    directory = tmp_path / "page"
    directory.mkdir()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("PG")},
        "PYTHONPATH": str(REPOSITORY),
        "PGTRICKLE_RELAY_POSTGRES_URL": page_database.dsn,
        "PGTRICKLE_RELAY_METRICS_ADDR": f"{LOOPBACK}:{free_port()}",
    }
    async with AsyncExitStack() as opened:
        connection = opened.enter_context(psycopg.connect(page_database.dsn, autocommit=True))
        yield Stage(
            database=page_database,
            connection=connection,
            shell=Shell(directory, environment),
            start_relay=relay_process,
            substitutions={
                "postgresql://postgres@localhost:5432/shop": page_database.dsn,
                "postgresql://postgres@localhost:5432/empty": database.dsn,
                "nats://localhost:4222": nats_server.url,
                "/tmp/": f"{directory}/",  # noqa: S108 - as the pages write it
                "scripts/demo --seconds 10": "python -m relay demo --seconds 2",
            },
        )


async def test_a_page_does_what_it_says(page: str, stage: Stage) -> None:
    for block in blocks(page):
        if block.reason_not_executed is not None or block.language not in ("sql", "console"):
            continue
        try:
            await _within(stage, block, EVENTUALLY_S if block.marker == EVENTUALLY else 0.0)
        except AssertionError as difference:
            relays = "\n".join(relay.output for relay in stage.relays)
            raise AssertionError(f"{block.place}\n{difference}\n{relays}") from None

    for relay in stage.relays:
        assert await relay.terminate() == 0, relay.output


async def _within(stage: Stage, block: Block, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            await stage.execute(block)
            return
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)


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
OVERLAYS = [block for block in YAML_BLOCKS if "@package _global_" in block.text]
RULES = [block for block in YAML_BLOCKS if block not in OVERLAYS]


@pytest.mark.parametrize("block", OVERLAYS, ids=lambda block: block.place)
def test_an_overlay_composes_to_valid_settings(block: Block, tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "documented.yaml").write_text(block.text)

    composed = compose_settings(["+env=documented"], config_dirs=[str(tmp_path)])

    assert type_settings(composed) != type_settings(compose_settings([]))


@pytest.mark.parametrize("block", RULES, ids=lambda block: block.place)
def test_an_alert_asks_for_metrics_and_labels_that_exist(block: Block) -> None:
    specs = {f"{PREFIX}{spec.name}": spec for spec in METRICS}
    rules = [rule for group in yaml.safe_load(block.text)["groups"] for rule in group["rules"]]

    assert rules
    for rule in rules:
        asked = re.findall(rf"({PREFIX}\w+)(?:\{{(\w+))?", rule["expr"])
        assert asked, rule
        for name, label in asked:
            assert name in specs, rule
            assert not label or label in specs[name].label_names, rule


async def test_a_backend_of_a_later_version_fails_as_the_guide_says(
    migrated_database: Database, relay_process: Callable[..., Awaitable[RelayProcess]]
) -> None:
    with psycopg.connect(migrated_database.dsn) as connection:
        connection.execute("select pgtrickle.enable_outbox('orders', capture => false)")
        connection.execute(
            "select pgtrickle.set_relay_outbox('o', 'orders', null,"
            """ '{"type": "sqs", "queue_url": "http://localhost/orders"}')"""
        )

    relay = await relay_process("drain", dsn=migrated_database.dsn)

    assert await relay.wait() == 1
    await relay.wait_for_log("'sqs' is not a type of sink")


@pytest.mark.parametrize(
    "block", [block for block in ALL_BLOCKS if block.reason_not_executed], ids=lambda b: b.place
)
def test_a_command_that_is_not_executed_is_one_that_the_relay_understands(block: Block) -> None:
    text = block.text.replace("\\\n", " ")
    for line in re.findall(
        r"^(?:ExecStart|docker run).*?pgtrickle-relay\S* (.*)$", text, re.MULTILINE
    ):
        verb, rest = cli._split_verb(shlex.split(line))
        arguments = cli._parser(verb).parse_args(rest)
        compose_settings(arguments.overrides)


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
