"""Closing a Redis sink and source, whatever became of the server: in time, and without a trace."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from relay.backends.redis import RedisSink, RedisSource
from relay.contracts import Batch
from relay.message import RelayMessage
from tests.contract.evidence import Belongings, numbered
from tests.contract.redis_broker import Broker, sink_of, source_of
from tests.contract.source_contract import collect
from tests.servers.proxy import TcpProxy
from tests.servers.redis import RedisServer
from tests.servers.tls import TlsFiles

STREAM = "closing"
MOST_S = 5.0
ROLES = pytest.mark.parametrize("make", [sink_of, source_of])

Proxies = Callable[[str, int], Awaitable[TcpProxy]]
Make = Callable[..., RedisSink | RedisSource]


async def used(end: RedisSink | RedisSource, broker: Broker) -> None:
    """Publish, or read what is then unacknowledged, with another read on its way."""
    await end.connect()
    if isinstance(end, RedisSink):
        assert not (await end.publish(numbered(10))).failures
    else:
        await broker.feed(numbered(10))
        await collect(end, 10)


@pytest.fixture
async def broker(redis_server: RedisServer) -> AsyncIterator[Broker]:
    broker = Broker(redis_server, STREAM)
    await broker.drop()
    yield broker
    await broker.drop()


@ROLES
@pytest.mark.parametrize("is_tls", [False, True])
async def test_a_start_and_a_stop_leave_no_task_no_thread_and_no_socket(
    redis_server_with: Callable[..., RedisServer], tls_files: TlsFiles, make: Make, *, is_tls: bool
) -> None:
    server = redis_server_with("", tls_files.contents(), is_tls=True)
    url = f"rediss://localhost:{server.tls_port}" if is_tls else server.url
    broker = Broker(server, STREAM)
    await broker.drop()
    belongings = Belongings()

    for _ in range(3):
        end = make(url, STREAM, **({"tls_ca": str(tls_files.authority)} if is_tls else {}))
        await used(end, broker)
        await end.aclose()

    await belongings.until_no_more_than_before()


@ROLES
@pytest.mark.parametrize("trouble", ["cut", "killed", "stalled"])
async def test_closing_is_bounded_while_the_server_is_gone(
    broker: Broker, tcp_proxy: Proxies, make: Make, trouble: str
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    belongings = Belongings()
    end = make(proxy.url(broker.server.url), STREAM)
    await used(end, broker)
    if trouble == "cut":
        await proxy.cut()
    elif trouble == "killed":
        await asyncio.to_thread(broker.server.kill)
    else:
        proxy.stall()
    started = time.monotonic()

    await end.aclose()

    assert time.monotonic() - started < MOST_S
    await proxy.restore()
    await asyncio.to_thread(broker.server.start)
    await belongings.until_no_more_than_before()


@ROLES
async def test_closing_is_bounded_in_the_middle_of_something(
    broker: Broker, tcp_proxy: Proxies, make: Make
) -> None:
    proxy = await tcp_proxy(*broker.server.address)
    belongings = Belongings()
    end = make(proxy.url(broker.server.url), STREAM)
    await used(end, broker)
    proxy.stall()
    large = RelayMessage(dedup_key="large", payload=b'"%b"' % (b"x" * 20_000_000), subject=STREAM)
    working = asyncio.create_task(
        end.publish([large]) if isinstance(end, RedisSink) else end.keep_alive(Batch())
    )
    await asyncio.sleep(0)
    started = time.monotonic()

    working.cancel()
    await asyncio.wait([working])
    await end.aclose()

    assert time.monotonic() - started < MOST_S
    await proxy.restore()
    await belongings.until_no_more_than_before()
