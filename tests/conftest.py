"""Fixtures of the whole test suite: servers, databases, the proxy and the relay's process."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.servers.finding import (
    LOOPBACK,
    ServerLedger,
    ServerMissing,
    free_port,
    leave_out,
)
from tests.servers.nats import NatsServer, configured_nats, find_nats
from tests.servers.postgres import Age, Database, PostgresServer, configured_postgres, find_postgres
from tests.servers.process import REPOSITORY, RelayProcess
from tests.servers.proxy import TcpProxy, proxied
from tests.servers.tls import TlsFiles, write_tls_files

pytest_plugins = [
    "tests.servers.http_fixtures",
    "tests.servers.kafka_fixtures",
    "tests.servers.redis_fixtures",
    "tests.servers.sqs_fixtures",
    "tests.servers.rabbitmq_fixtures",
]

# Examples talk to real servers on shared machines: a slow one says nothing about the code.
settings.register_profile(
    "servers", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("servers")

_LEDGER = pytest.StashKey[ServerLedger]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEDGER] = ServerLedger()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several processes hands what it knows of its servers to the one that reports."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        ledger = session.config.stash[_LEDGER]
        output["servers"] = {"found": ledger.found, "missing": ledger.missing}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Called where the tests run in several processes, for each that has ended."""
    servers = getattr(node, "workeroutput", {}).get("servers", {})
    ledger = node.config.stash[_LEDGER]
    ledger.found.update(servers.get("found", {}))
    ledger.missing.update(servers.get("missing", {}))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    lines = config.stash[_LEDGER].lines()
    if lines:
        terminalreporter.section("which server each backend was tested against")
        for line in lines:
            terminalreporter.line(line)
    if os.environ.get("PGTRICKLE_TEST_CHECKS", "0") != "0":
        terminalreporter.line("scripts/check FAILED, see above", red=True, bold=True)
    started_at = os.environ.get("PGTRICKLE_TEST_STARTED_AT")
    if started_at is not None:
        total_s = time.time() - float(started_at)
        terminalreporter.line(f"environment, checks and tests together: {total_s:.0f} s")


@pytest.fixture(scope="session")
def server_ledger(request: pytest.FixtureRequest) -> ServerLedger:
    """What the run says about its servers in the end; fixtures of servers write into it."""
    return request.config.stash[_LEDGER]


@pytest.fixture(scope="session")
def _postgres_of_age(server_ledger: ServerLedger) -> Iterator[Callable[[Age], PostgresServer]]:
    servers: dict[Age, PostgresServer] = {}

    def get(age: Age) -> PostgresServer:
        name = f"postgres ({age})"
        if age not in servers:
            try:
                server = find_postgres(age)
            except ServerMissing as missing:
                server_ledger.missing[name] = str(missing)
                leave_out(f"{name}: {missing}")
            servers[age] = server
            server_ledger.found[name] = f"PostgreSQL {server.version} ({server.origin})"
        return servers[age]

    yield get
    for server in servers.values():
        try:
            server.drop_templates()
        finally:
            server.control.close()


@pytest.fixture(scope="session")
def postgres_server(_postgres_of_age: Callable[[Age], PostgresServer]) -> PostgresServer:
    """The newest supported PostgreSQL, shared by the session.

    A test that stops it starts it again before it ends.
    """
    return _postgres_of_age("newest")


@pytest.fixture(scope="session", params=["newest", "oldest"])
def any_postgres_server(
    request: pytest.FixtureRequest, _postgres_of_age: Callable[[Age], PostgresServer]
) -> PostgresServer:
    """Each supported PostgreSQL in turn: the newest and the oldest."""
    age: Age = request.param
    return _postgres_of_age(age)


@pytest.fixture
def database(postgres_server: PostgresServer) -> Iterator[Database]:
    """A fresh empty database, dropped afterwards."""
    with postgres_server.database() as created:
        yield created


@pytest.fixture
def any_database(any_postgres_server: PostgresServer) -> Iterator[Database]:
    """A fresh empty database on each supported PostgreSQL."""
    with any_postgres_server.database() as created:
        yield created


@pytest.fixture
def migrated_database(postgres_server: PostgresServer) -> Iterator[Database]:
    """A fresh database with the relay's catalog, dropped afterwards."""
    with postgres_server.migrated_database() as created:
        yield created


@pytest.fixture
def any_migrated_database(any_postgres_server: PostgresServer) -> Iterator[Database]:
    """A fresh database with the relay's catalog on each supported PostgreSQL."""
    with any_postgres_server.migrated_database() as created:
        yield created


@pytest.fixture
def another_migrated_database(postgres_server: PostgresServer) -> Iterator[Database]:
    """A second database beside `migrated_database`, for what goes from one to the other."""
    with postgres_server.migrated_database() as created:
        yield created


@pytest.fixture
def postgres_server_with() -> Iterator[Callable[..., PostgresServer]]:
    """A factory of PostgreSQL servers with settings of their own, for TLS and authentication.

    `postgres_server_with({"ssl": "on", …}, files={"pg_hba.conf": …, "server.key": …})`
    """
    with ExitStack() as servers:

        def start(
            settings: Mapping[str, str], files: Mapping[str, bytes] | None = None
        ) -> PostgresServer:
            try:
                server = configured_postgres(settings, files)
            except ServerMissing as missing:
                leave_out(f"postgres: {missing}")
            servers.callback(server.control.close)
            return server

        yield start


@pytest.fixture(scope="session")
def nats_server(server_ledger: ServerLedger) -> Iterator[NatsServer]:
    """NATS with JetStream on file storage, shared by the session.

    A test uses stream names of its own; one that stops the server starts it again.
    """
    try:
        server = find_nats()
    except ServerMissing as missing:
        server_ledger.missing["nats"] = str(missing)
        leave_out(f"nats: {missing}")
    server_ledger.found["nats"] = f"NATS {server.version} ({server.origin})"
    yield server
    server.control.close()


@pytest.fixture
def nats_server_with() -> Iterator[Callable[..., NatsServer]]:
    """A factory of NATS servers with extra configuration, for TLS, authentication and limits.

    `nats_server_with(configuration, files={"name": content})`; the configuration names the
    files by their bare name.
    """
    with ExitStack() as servers:

        def start(configuration: str, files: Mapping[str, bytes] | None = None) -> NatsServer:
            try:
                server = configured_nats(configuration, files)
            except ServerMissing as missing:
                leave_out(f"nats: {missing}")
            servers.callback(server.control.close)
            return server

        yield start


@pytest.fixture
async def tcp_proxy() -> AsyncIterator[Callable[[str, int], Awaitable[TcpProxy]]]:
    """A factory of proxies: `proxy = await tcp_proxy(host, port)`."""
    async with AsyncExitStack() as proxies:

        async def start(host: str, port: int) -> TcpProxy:
            return await proxies.enter_async_context(proxied(host, port))

        yield start


@pytest.fixture
async def relay_process(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[RelayProcess]]]:
    """A factory of real relays, each in its own process and an empty directory.

    `await relay_process(*arguments, dsn=None, environment={})` starts
    `python -m relay *arguments` with the DSN and a free metrics address in its environment.
    What still runs at the end of the test is killed.
    """
    async with AsyncExitStack() as processes:

        async def start(
            *arguments: str,
            dsn: str | None = None,
            environment: Mapping[str, str] | None = None,
            directory: Path | None = None,
        ) -> RelayProcess:
            port = free_port()
            full = {
                **{k: v for k, v in os.environ.items() if not k.startswith("PG")},
                "PYTHONPATH": str(REPOSITORY),
                "PGTRICKLE_RELAY_METRICS_ADDR": f"{LOOPBACK}:{port}",
                **({} if dsn is None else {"PGTRICKLE_RELAY_POSTGRES_URL": dsn}),
                **(environment or {}),
            }
            process = RelayProcess(arguments, full, directory or tmp_path, port)
            processes.push_async_callback(process.aclose)
            await process.start()
            return process

        yield start


@pytest.fixture(scope="session")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    """An authority, a server's and a client's certificate, made once per session."""
    return write_tls_files(tmp_path_factory.mktemp("tls"))
