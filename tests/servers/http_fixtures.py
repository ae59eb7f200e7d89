"""Fixtures of HTTP servers in the test's own process."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from tests.servers.finding import ServerLedger
from tests.servers.http import HttpServer, running


@pytest.fixture
async def http_server(server_ledger: ServerLedger) -> AsyncIterator[HttpServer]:
    """A server that accepts everything until it is told otherwise."""
    async with running() as server:
        server_ledger.found["http"] = f"{server.version} (in the tests' own process)"
        yield server


@pytest.fixture
async def https_server_with() -> AsyncIterator[Callable[..., Awaitable[HttpServer]]]:
    """A factory of servers with TLS: `await https_server_with(context)`."""
    async with AsyncExitStack() as servers:

        async def start(context: ssl.SSLContext) -> HttpServer:
            return await servers.enter_async_context(running(context))

        yield start
