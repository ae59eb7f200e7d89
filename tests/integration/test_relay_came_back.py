"""What was deleted and made again is found within seconds, however long it was away."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Protocol

import aioboto3
import nats
import pytest
from nats.js.api import StreamConfig

from tests.contract.kafka_broker import Broker as KafkaTopic
from tests.contract.rabbitmq_broker import Broker as RabbitQueue
from tests.contract.redis_broker import Broker as RedisStream
from tests.integration.relay_surroundings import (
    RelayWorld,
    StartProcess,
    relay_world,
    until,
)
from tests.servers.http import OK, HttpServer, Received, Reply, running
from tests.servers.kafka import KafkaServer
from tests.servers.nats import NatsServer
from tests.servers.postgres import Database
from tests.servers.process import RelayProcess
from tests.servers.rabbitmq import RabbitServer
from tests.servers.redis import RedisServer
from tests.servers.sqs import SqsServer

# Long enough that a back-off which doubles from a second on would wait longer than the bound.
AWAY_S = 16.0
NOTICED_S = 5.0
# What a busy machine may add to the bound.
MARGIN_S = 5.0
BOUND_S = 60.0
# As in production, where the tests' relays have shorter ones.
PACE = ("relay.failed_retry_s=30", "relay.retry_initial_ms=1000", "relay.retry_max_ms=60000")
NAME = "cameback"


class Place(Protocol):
    """A stream, topic, queue, table or path that can be deleted, and its two pipelines."""

    async def make(self) -> None: ...

    async def remove(self) -> None: ...

    def sink(self) -> Mapping[str, object]: ...

    def source(self) -> Mapping[str, object] | None:
        """None where nothing comes back from there."""
        ...

    async def has(self, world: RelayWorld, id_: int) -> bool:
        """Whether the row has arrived where nothing comes back."""
        ...


class _ComesBack:
    async def has(self, world: RelayWorld, id_: int) -> bool:  # noqa: ARG002 - others ask it
        raise AssertionError("its inbox has it")


class _Nats(_ComesBack):
    def __init__(self, server: NatsServer) -> None:
        self._url = server.url

    async def make(self) -> None:
        client = await nats.connect(self._url)
        await client.jetstream().add_stream(StreamConfig(name=NAME, subjects=[f"{NAME}.>"]))
        await client.close()

    async def remove(self) -> None:
        client = await nats.connect(self._url)
        with contextlib.suppress(nats.js.errors.NotFoundError):
            await client.jetstream().delete_stream(NAME)
        await client.close()

    def sink(self) -> Mapping[str, object]:
        return {"type": "nats", "url": self._url, "subject_template": f"{NAME}.{{op}}"}

    def source(self) -> Mapping[str, object]:
        return {"type": "nats", "url": self._url, "stream": NAME, "subject": f"{NAME}.>"}


class _Kafka(_ComesBack):
    def __init__(self, server: KafkaServer) -> None:
        self._topic = KafkaTopic(server)
        self._place = {
            "type": "kafka",
            "brokers": server.brokers,
            "topic": self._topic.topic,
            "request_timeout_ms": 8000,
        }

    async def make(self) -> None:
        await self._topic.create()

    async def remove(self) -> None:
        await self._topic.drop()

    def sink(self) -> Mapping[str, object]:
        return self._place

    def source(self) -> Mapping[str, object]:
        return {**self._place, "group_id": self._topic.topic, "auto_offset_reset": "earliest"}


class _Redis(_ComesBack):
    """The sink makes the stream, so only the source misses it, and the group in it."""

    def __init__(self, server: RedisServer) -> None:
        self._stream = RedisStream(server, NAME)
        self._place = {"type": "redis", "url": server.url, "stream_key": NAME}

    async def make(self) -> None:
        pass

    async def remove(self) -> None:
        await self._stream.drop()

    def sink(self) -> Mapping[str, object]:
        return self._place

    def source(self) -> Mapping[str, object]:
        return {**self._place, "group_name": NAME, "start_id": "0"}


class _Rabbit(_ComesBack):
    def __init__(self, server: RabbitServer) -> None:
        self._broker = RabbitQueue(server, NAME)
        self._place = {"type": "rabbitmq", "url": server.url}

    async def make(self) -> None:
        await self._broker.make()

    async def remove(self) -> None:
        await self._broker.drop()

    def sink(self) -> Mapping[str, object]:
        return {**self._place, "exchange": self._broker.exchange}

    def source(self) -> Mapping[str, object]:
        return {**self._place, "queue": self._broker.queue}


class _Sqs(_ComesBack):
    def __init__(self, server: SqsServer) -> None:
        self._server = server
        self._queue_url = f"{server.url}/123456789012/{NAME}"

    async def make(self) -> None:
        await self._ask("create_queue", QueueName=NAME)

    async def remove(self) -> None:
        await self._ask("delete_queue", QueueUrl=self._queue_url)

    def sink(self) -> Mapping[str, object]:
        keys = {key: f"${{env:RELAY_{key.upper()}}}" for key in self._server.keys}
        return {
            "type": "sqs",
            "queue_url": self._queue_url,
            "region": self._server.region,
            **keys,
        }

    def source(self) -> Mapping[str, object]:
        return self.sink()

    async def _ask(self, action: str, **arguments: str) -> None:
        keys = {f"aws_{key}": value for key, value in self._server.keys.items()}
        session = aioboto3.Session(region_name=self._server.region, **keys)
        async with session.client("sqs", endpoint_url=self._server.url) as client:
            await getattr(client, action)(**arguments)


class _Inbox:
    def __init__(self, world: RelayWorld) -> None:
        self._world = world

    async def make(self) -> None:
        await self._world.run("select pgtrickle.create_inbox('aside')")

    async def remove(self) -> None:
        await self._world.run("select pgtrickle.drop_inbox('aside')")

    def sink(self) -> Mapping[str, object]:
        return {"type": "pg-inbox", "inbox": "aside"}

    def source(self) -> None:
        return None

    async def has(self, world: RelayWorld, id_: int) -> bool:
        return await _is_in(world, "aside", id_)


class _Group(_Inbox):
    """Of the way into the inbox; that stays."""

    async def make(self) -> None:
        if not await self._world.value("select to_regclass('pgtrickle.grouped') is not null"):
            await self._world.run("select pgtrickle.create_inbox('grouped')")
        await self._world.run("select pgtrickle.create_consumer_group('g', 'orders', 'earliest')")

    async def remove(self) -> None:
        await self._world.run("select pgtrickle.drop_consumer_group('g')")

    def sink(self) -> Mapping[str, object]:
        return {"type": "pg-inbox", "inbox": "grouped"}

    async def has(self, world: RelayWorld, id_: int) -> bool:
        return await _is_in(world, "grouped", id_)


class _Webhook:
    """A page that is away answers 404."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server

    async def make(self) -> None:
        self._server.judge = lambda _: OK

    async def remove(self) -> None:
        def missing(_: Received) -> Reply:
            return Reply(404)

        self._server.judge = missing

    def sink(self) -> Mapping[str, object]:
        return {"type": "webhook", "url": self._server.url}

    def source(self) -> None:
        return None

    async def has(self, world: RelayWorld, id_: int) -> bool:  # noqa: ARG002 - others ask it
        row = re.compile(rb'"id": *%d\b' % id_)
        return any(row.search(one.body) for one in self._server.accepted)


class _File(_ComesBack):
    """The directory is moved aside, and back: a file is there as a whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def make(self) -> None:
        aside = self._directory.with_suffix(".aside")
        if aside.exists():
            aside.rename(self._directory)
        else:
            self._directory.mkdir()

    async def remove(self) -> None:
        self._directory.rename(self._directory.with_suffix(".aside"))

    def sink(self) -> Mapping[str, object]:
        return {"type": "file", "output": str(self._directory / "out.jsonl")}

    def source(self) -> Mapping[str, object]:
        return {"type": "file", "input": str(self._directory / "out.jsonl"), "follow": True}


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        yield world


async def test_what_was_away_for_long_is_found_within_five_seconds_of_its_return(
    world: RelayWorld,
    nats_server: NatsServer,
    kafka_server: KafkaServer,
    redis_server: RedisServer,
    rabbitmq_server: RabbitServer,
    sqs_server: SqsServer,
) -> None:
    async with running() as receiver:
        places: dict[str, Place] = {
            "nats": _Nats(nats_server),
            "kafka": _Kafka(kafka_server),
            "redis": _Redis(redis_server),
            "rabbitmq": _Rabbit(rabbitmq_server),
            "sqs": _Sqs(sqs_server),
            "inbox": _Inbox(world),
            "group": _Group(world),
            "webhook": _Webhook(receiver),
            "file": _File(world.directory / "deleted"),
        }
        for name, place in places.items():
            await place.make()
            by_a_group = {"source": {"outbox": "orders", "consumer_group": "g"}}
            keys = by_a_group if name == "group" else {}
            await world.forward(f"to-{name}", place.sink(), **keys)
            if (source := place.source()) is not None:
                await world.reverse(f"from-{name}", source, name)
        relay = await world.relay(
            *PACE, environment={f"RELAY_{k.upper()}": v for k, v in sqs_server.keys.items()}
        )
        await _arrived(world, places, 1)

        gone_at = time.monotonic()
        for place in places.values():
            await place.remove()
        await world.insert(2, 2)
        await _until_missed(world, relay, gone_at)
        for place in places.values():
            await place.make()

        took_s = await _arrived(world, places, 3)
        late = {name: s for name, s in took_s.items() if s > NOTICED_S + MARGIN_S}
        assert not late, took_s


async def _arrived(world: RelayWorld, places: Mapping[str, Place], id_: int) -> dict[str, float]:
    """Write a row, and wait until all have it; after how many seconds each had."""
    began, took_s = time.monotonic(), dict[str, float]()
    await world.insert(id_, id_)

    async def have_all() -> bool:
        for name in places.keys() - took_s.keys():
            place = places[name]
            is_there = _is_in(world, name, id_) if place.source() else place.has(world, id_)
            if await is_there:
                took_s[name] = time.monotonic() - began
        return took_s.keys() == places.keys()

    try:
        await until(have_all, timeout_s=BOUND_S, every_s=0.1)
    except AssertionError:
        raise AssertionError(f"missing: {places.keys() - took_s.keys()}") from None
    return took_s


async def _until_missed(world: RelayWorld, relay: RelayProcess, gone_at: float) -> None:
    """Until what is gone has been away for long, and is missed by those who need it."""

    async def is_missed() -> bool:
        pipelines = (await world.health(relay)).pipelines
        well = {name for name, one in pipelines.items() if one.state == "running"}
        # The sink makes the stream of Redis again.
        return (
            well <= {"to-redis", "from-redis", "from-kafka"} and time.monotonic() - gone_at > AWAY_S
        )

    try:
        await until(is_missed, timeout_s=BOUND_S)
    except AssertionError:
        raise AssertionError((await world.health(relay)).pipelines) from None


async def _is_in(world: RelayWorld, inbox: str, id_: int) -> bool:
    query = f"select exists (select from pgtrickle.{inbox} where (payload ->> 'id')::int = $1)"
    return bool(await world.value(query, id_))
