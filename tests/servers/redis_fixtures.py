"""Fixtures of the Redis servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

import pytest

from tests.servers.finding import ServerLedger, ServerMissing, leave_out
from tests.servers.redis import RedisServer, configured_redis, find_redis


@pytest.fixture(scope="session")
def redis_server(server_ledger: ServerLedger) -> Iterator[RedisServer]:
    """Redis with an append-only file, shared by the session.

    A test uses stream keys of its own; one that stops the server starts it again.
    """
    try:
        server = find_redis()
    except ServerMissing as missing:
        server_ledger.missing["redis"] = str(missing)
        leave_out(f"redis: {missing}")
    server_ledger.found["redis"] = f"Redis {server.version} ({server.origin})"
    yield server
    server.control.close()


@pytest.fixture
def redis_server_with() -> Iterator[Callable[..., RedisServer]]:
    """A factory of Redis servers with extra configuration, for TLS, access rules and limits.

    `redis_server_with(configuration, files={"name": content}, is_tls=False)`; the configuration
    names the files by their bare name.
    """
    with ExitStack() as servers:

        def start(
            configuration: str,
            files: Mapping[str, bytes] | None = None,
            *,
            is_tls: bool = False,
        ) -> RedisServer:
            try:
                server = configured_redis(configuration, files, is_tls=is_tls)
            except ServerMissing as missing:
                leave_out(f"redis: {missing}")
            servers.callback(server.control.close)
            return server

        yield start
