"""Where blocks are executed: a database, a shell, relays, and servers for the pages' addresses."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import psycopg

from tests.docs import sql_block
from tests.docs.console_block import Command, Shell, commands
from tests.docs.page import BACKGROUND, EVENTUALLY, FIGURES_VARY, Block
from tests.servers.postgres import Database
from tests.servers.process import RelayProcess

EVENTUALLY_S = 30.0
EXECUTED_LANGUAGES = ("sql", "console")


@dataclass
class Stage:
    """Where one page, or one section of it, is executed."""

    database: Database
    connection: psycopg.Connection[tuple[object, ...]]
    shell: Shell
    start_relay: Callable[..., Awaitable[RelayProcess]]
    substitutions: dict[str, str]
    relays: list[RelayProcess] = field(default_factory=list)

    def here(self, text: str) -> str:
        """The text with the servers and directories of this stage for those of the page."""
        # What is part of something longer comes behind it.
        for written in sorted(self.substitutions, key=len, reverse=True):
            text = text.replace(written, self.substitutions[written])
        return text

    async def perform(self, block: Block) -> None:
        """Execute a block as its marker says. Raises `AssertionError` where it does otherwise."""
        if block.reason_not_executed is not None or block.language not in EXECUTED_LANGUAGES:
            return
        try:
            await self._within(block, EVENTUALLY_S if block.marker == EVENTUALLY else 0.0)
        except AssertionError as difference:
            relays = "\n".join(relay.output for relay in self.relays)
            raise AssertionError(f"{block.place}\n{difference}\n{relays}") from None

    async def end_relays(self) -> None:
        """Stop what was started in the background, in order."""
        for relay in self.relays:
            assert await relay.terminate() == 0, relay.output
        self.relays.clear()

    async def _within(self, block: Block, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                await self._execute(block)
                return
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)

    async def _execute(self, block: Block) -> None:
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
        if program != "pgtrickle-relay":
            await self.shell.start(command)
            return
        relay = await self.start_relay(
            *arguments,
            dsn=self.database.dsn,
            environment=await self.shell.exported(),
            directory=self.shell.directory,
        )
        await relay.wait_until_ready()
        self.relays.append(relay)
        self.substitutions["localhost:9090"] = relay.http_url.removeprefix("http://")
