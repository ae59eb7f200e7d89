"""Redis with a replica: what `wait_replicas` confirmed survives the primary."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
from redis.asyncio import Redis

from tests.integration.relay_surroundings import (
    Event,
    RelayWorld,
    until,
)
from tests.servers.finding import LOOPBACK
from tests.servers.proxy import TcpProxy
from tests.servers.redis import RedisServer

ROWS = 20
STREAM = "orders"


async def test_nothing_is_committed_that_the_replica_does_not_have(
    world: RelayWorld,
    redis_server_with: Callable[..., RedisServer],
    tcp_proxy: Callable[[str, int], Awaitable[TcpProxy]],
) -> None:
    primary = redis_server_with("")
    link = await tcp_proxy(LOOPBACK, primary.address[1])
    replica = redis_server_with(f"replicaof {LOOPBACK} {link.listen_port}")
    async with Redis.from_url(replica.url) as at_replica:
        await until(lambda: _is_in_sync(at_replica))
        await world.forward("out", _sink(primary))
        relay = await world.relay()
        await world.insert(1, ROWS)
        await until(lambda: _has(at_replica, ROWS))
        await until(lambda: _is_committed(world))

        link.stall()
        await world.insert(ROWS + 1, 2 * ROWS)
        # They are at the primary, and the replica lacks them: not delivered.
        await relay.wait_for_log("fewer than 1 replicas received the events")
        assert await world.value(_POSITION) == ROWS
        await asyncio.to_thread(primary.kill)
        await at_replica.replicaof("NO", "ONE")
        await world.forward("out", _sink(replica, wait_replicas=0))

        await until(lambda: _has(at_replica, 2 * ROWS))
        entries: list[tuple[bytes, dict[bytes, bytes]]] = await at_replica.xrange(STREAM)  # type: ignore[assignment]
    events = [msgspec.json.decode(fields[b"payload"], type=Event) for _, fields in entries]
    assert [event.id for event in events] == list(range(1, 2 * ROWS + 1))


_POSITION = "select max(last_change_id) from pgtrickle.relay_consumer_offsets"


def _sink(server: RedisServer, wait_replicas: int = 1) -> dict[str, object]:
    return {
        "type": "redis",
        "url": server.url,
        "stream_key": STREAM,
        "wait_replicas": wait_replicas,
        "timeout_ms": 500,
    }


async def _is_in_sync(replica: Redis) -> bool:
    replication: dict[str, object] = await replica.info("replication")
    return replication["master_link_status"] == "up"


async def _is_committed(world: RelayWorld) -> bool:
    return await world.value(_POSITION) == ROWS


async def _has(server: Redis, entries: int) -> bool:
    return int(await server.xlen(STREAM)) >= entries
