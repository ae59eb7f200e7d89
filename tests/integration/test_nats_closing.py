"""Starting and stopping against a NATS server: nothing stays behind, and no stop takes long."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from relay.backends.nats import NatsSink, NatsSource
from relay.errors import RelayError
from tests.contract.evidence import numbered
from tests.contract.nats_broker import Broker, port_of, sink_of, source_of
from tests.contract.source_contract import collect
from tests.servers.finding import free_port
from tests.servers.nats import NatsServer
from tests.servers.proxy import TcpProxy

Proxies = Callable[[str, int], Awaitable[TcpProxy]]
BOUND_S = 15


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    broker = Broker(nats_server, "closing")
    await broker.create()
    yield broker
    await broker.drop()


class Left:
    """What a backend left behind since this was made: tasks, threads and sockets."""

    def __init__(self) -> None:
        self._before = self._now()

    def all(self) -> list[object]:
        """All of it; empty at best."""
        return [one for one in self._now() if one not in self._before]

    def _now(self) -> list[object]:
        sockets = (_socket(file) for file in Path("/proc/self/fd").iterdir())
        return [*asyncio.all_tasks(), *threading.enumerate(), *filter(None, sockets)]


def _socket(file: Path) -> str | None:
    try:
        name = str(file.readlink())
    except FileNotFoundError:
        return None
    return name if name.startswith("socket:") else None


async def test_a_start_and_a_stop_leave_no_task_thread_or_socket(broker: Broker) -> None:
    left = Left()

    for _ in range(2):
        sink = sink_of(broker.server.url)
        await sink.connect()
        assert not (await sink.publish(numbered(100))).failures
        assert await sink.is_healthy()
        await sink.aclose()

        source = source_of(broker.server.url)
        await source.connect()
        await collect(source, 50)
        await source.aclose()
        assert left.all() == []


async def test_a_start_that_fails_leaves_no_task_thread_or_socket(
    nats_server_with: Callable[..., NatsServer],
) -> None:
    refusing = nats_server_with('authorization { user: "relay", password: "right" }')
    nobody = f"nats://127.0.0.1:{free_port()}"
    left = Left()

    for url in (refusing.url, nobody):
        for backend in (sink_of(url), source_of(url), sink_of(url, tls=True)):
            with pytest.raises(RelayError):
                await backend.connect()
            assert left.all() == []


@pytest.mark.parametrize("blow", ["cut", "stall"])
async def test_a_stop_while_the_server_is_gone_is_bounded_and_leaves_nothing(
    broker: Broker, tcp_proxy: Proxies, blow: str
) -> None:
    proxy = await tcp_proxy(*port_of(broker.server.url))
    url = proxy.url(broker.server.url)
    left = Left()
    backends: list[NatsSink | NatsSource] = [sink_of(url), source_of(url)]
    for backend in backends:
        await backend.connect()
        if isinstance(backend, NatsSink):
            await backend.publish(numbered(100))
        else:
            await collect(backend, 100)
    if blow == "cut":
        await proxy.cut()
    else:
        proxy.stall()

    started = time.monotonic()
    for backend in backends:
        await backend.aclose()
    took_s = time.monotonic() - started

    assert took_s < BOUND_S
    await proxy.aclose()
    assert left.all() == []
