"""A Redis stream that is deleted and made again, with entry ids that its producer chooses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from relay.backends.redis import RedisSource
from relay.contracts import Batch
from relay.errors import NotConnected, PositionLost
from tests.contract.evidence import PAUSE_S, dedup_keys, reconnect
from tests.contract.redis_broker import Broker, source_of
from tests.contract.source_contract import collect, messages_of
from tests.servers.redis import RedisServer

STREAM = "generations"
IDS = ("1-0", "2-0", "3-0", "4-0")


@pytest.fixture
async def broker(redis_server: RedisServer) -> AsyncIterator[Broker]:
    broker = Broker(redis_server, STREAM)
    await broker.drop()
    yield broker
    await broker.drop()


async def put(broker: Broker, name: str) -> None:
    """Add entries whose ids are the same each time."""
    for id_ in IDS:
        await broker.ask("XADD", STREAM, id_, "payload", f'"{name} {id_}"')


async def connected(broker: Broker, **keys: object) -> RedisSource:
    source = source_of(broker.server.url, STREAM, **keys)
    await source.connect()
    return source


async def handled(source: RedisSource) -> list[str]:
    """Collect and acknowledge all entries; their dedup keys."""
    batches = await collect(source, len(IDS))
    for batch in batches:
        await source.acknowledge(batch)
    return dedup_keys(messages_of(batches))


async def until_broken(source: RedisSource) -> None:
    """Poll until the source says that its stream is not what it was."""
    async with asyncio.timeout(10):
        with contextlib.suppress(PositionLost, NotConnected):
            while True:
                assert not (await source.poll()).messages


@pytest.mark.parametrize("is_connected", [True, False])
async def test_entries_of_a_stream_made_again_are_other_entries(
    broker: Broker, *, is_connected: bool
) -> None:
    await put(broker, "first")
    source = await connected(broker)
    keys = set(await handled(source))

    for round_ in range(2, 5):
        if not is_connected:
            await source.aclose()
        await broker.drop()
        await put(broker, str(round_))
        if is_connected:
            await until_broken(source)
        await reconnect(source.connect)
        keys.update(await handled(source))
        assert len(keys) == round_ * len(IDS)
    await source.aclose()


async def test_entries_that_are_read_again_are_the_same_whoever_reads_them(
    broker: Broker,
) -> None:
    await put(broker, "first")
    first = await connected(broker)
    keys = dedup_keys(messages_of(await collect(first, len(IDS))))
    assert keys == [f"redis:{STREAM}:{await broker.generation()}:{id_}" for id_ in IDS]
    await broker.cut_off()

    # As pending after a crash, in a group made again, and in another group.
    for group in ("pipeline", "pipeline", "other"):
        source = await connected(broker, group_name=group)
        assert await handled(source) == keys
        await source.aclose()
        await broker.ask("XGROUP", "DESTROY", STREAM, group)
    await first.aclose()


@pytest.mark.parametrize("is_made_again", [True, False])
async def test_sources_that_start_at_once_agree(broker: Broker, *, is_made_again: bool) -> None:
    for round_ in range(5):
        if is_made_again:
            await broker.drop()
        sources = [
            source_of(broker.server.url, STREAM, group_name=f"{round_}.{number % 4}")
            for number in range(8)
        ]
        await asyncio.gather(*(source.connect() for source in sources))
        if is_made_again or round_ == 0:
            await put(broker, "first")
        keys = [await handled(source) for source in sources[:4]]

        assert all(one == keys[0] for one in keys)
        await asyncio.gather(*(source.aclose() for source in sources))


async def test_a_stream_that_another_relay_made_again_between_two_reads_is_noticed(
    broker: Broker,
) -> None:
    await put(broker, "first")
    source = await connected(broker, block_ms=50)
    keys = set(await handled(source))
    await source.poll()
    # Its own read has ended, so that nothing tells it: the group is there again when it looks.
    async with asyncio.timeout(10):
        while True:
            if "'blocked_clients': 0" in str(await broker.ask("INFO", "clients")):
                break
            await asyncio.sleep(PAUSE_S)
    await broker.drop()
    await put(broker, "second")
    other = await connected(broker, consumer_name="other")
    await other.aclose()

    found: list[Batch] = []
    async with asyncio.timeout(10):
        while sum(len(batch.messages) for batch in found) < len(IDS):
            try:
                found.append(await source.poll())
            except (NotConnected, PositionLost):
                await source.connect()

    arrived = messages_of(found)
    assert keys.isdisjoint(dedup_keys(arrived))
    assert [one.payload for one in arrived] == [b'"second %b"' % id_.encode() for id_ in IDS]
    await source.aclose()


async def test_a_user_who_may_not_ask_for_it_reads_without_a_generation(
    redis_server_with: Callable[..., RedisServer],
) -> None:
    rules = f"~{STREAM} +xgroup|create +xreadgroup +xack +xclaim +xautoclaim"
    server = redis_server_with(f"user relay on >p {rules}")
    broker = Broker(server, STREAM)
    await put(broker, "first")
    source = await connected(broker, username="relay", password="p")

    assert await handled(source) == [f"redis:{STREAM}:{id_}" for id_ in IDS]

    await source.aclose()
    await broker.ask("ACL", "SETUSER", "relay", "+xinfo|groups")
    await broker.drop()
    await put(broker, "second")
    await source.connect()
    generation = await broker.generation()
    assert await handled(source) == [f"redis:{STREAM}:{generation}:{id_}" for id_ in IDS]
    await source.aclose()


async def test_what_keeps_the_generation_keeps_nothing_in_the_stream(broker: Broker) -> None:
    await put(broker, "first")
    source = await connected(broker)
    await handled(source)

    assert await broker.ask("XTRIM", STREAM, "MAXLEN", "0") == len(IDS)
    assert await broker.pending("pgtrickle:generation") == 0
    assert not (await source.poll()).messages
    await source.aclose()
