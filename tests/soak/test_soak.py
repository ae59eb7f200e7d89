"""Every backend in both directions under load, while relays and servers are killed at random.

One captured table goes out to every destination, and what arrives there comes back into an inbox
of its own: each inbox must end up with every event of the outbox, once. Two minutes by default;
`just soak` runs half an hour, after which memory must have become flat too.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import aio_pika
import aioboto3
import asyncpg
import msgspec
import nats
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from nats.js.api import StreamConfig

from tests.integration.relay_surroundings import (
    MEMBER,
    RelayWorld,
    StartProcess,
    events_in,
    relay_world,
    until,
)
from tests.servers.finding import LOOPBACK, ServerControl, free_port
from tests.servers.kafka import KafkaServer
from tests.servers.nats import NatsServer
from tests.servers.postgres import Database, PostgresServer
from tests.servers.process import RelayProcess
from tests.servers.rabbitmq import RabbitServer
from tests.servers.redis import RedisServer
from tests.servers.sqs import SqsServer

SECONDS = float(os.environ.get("PGTRICKLE_SOAK_SECONDS", "120"))
SEED = int(os.environ.get("PGTRICKLE_SOAK_SEED", "1"))
# Where the summary goes as JSON, for those who keep figures.
REPORT = os.environ.get("PGTRICKLE_SOAK_REPORT")

RELAYS = 3
CATCH_UP_S = 240.0
_MOST_ROWS = 2_000
BETWEEN_KILLS_S = (2.0, 6.0)
AWAY_S = (0.0, 4.0)
# The embedded server of SQS takes some hundred events a second, each HTTP request one.
QUICK = ("nats", "kafka", "redis", "rabbitmq", "inbox", "file")
SLOW = ("sqs", "webhook")
# A relay's memory is judged where it is older than this, by the middle and the last third of the
# time after.
YOUNG_S = 600.0
MEMORY_GROWTH = 1.05
# Of one relay: a lock and a listening connection and its pool.
CONNECTIONS_A_RELAY = 30
OPEN_FILES = 400
# The exit code of a relay whose database is out of reach at its start.
_NO_DATABASE = 3

_EXPECTED = """
select coalesce(sum(inserted_count + deleted_count), 0)::bigint, count(*)
from pgtrickle.outbox_{table}
"""
_LOST = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
_CONNECTIONS = """
select count(*) from pg_stat_activity where usename = $1 and datname = current_database()
"""
_ARRIVED = """
select count(*), count(distinct split_part(event_id, ':', 2))
from pgtrickle.{inbox}
"""


@dataclass
class Summary:
    """What happened, for the report."""

    seconds: float = 0.0
    kills: dict[str, int] = field(default_factory=dict)
    events: int = 0
    arrived: int = 0
    repeated_in_the_file: int = 0
    catch_up_s: float = 0.0
    # Mean resident memory of the relay that was never killed, by thirds of the time it was watched.
    memory_kib: list[int] = field(default_factory=list)
    most_connections: int = 0
    most_files: int = 0

    def count_kill(self, name: str) -> None:
        self.kills[name] = self.kills.get(name, 0) + 1


@dataclass
class Relays:
    """A few relays of one group; the first is never killed, so that its memory can be told."""

    world: RelayWorld
    environment: Mapping[str, str]
    running: dict[int, RelayProcess] = field(default_factory=dict)

    async def start(self, number: int) -> None:
        self.running[number] = await self.world.relay(
            environment={**self.environment, "RELAY_SOAK_PORT": str(free_port())}, is_awaited=False
        )

    async def kill(self, number: int) -> None:
        await self.running.pop(number).kill()

    async def stop(self, number: int) -> None:
        relay = self.running.pop(number)
        if relay.exit_code is None:
            relay.send_signal(signal.SIGTERM)
        code = await relay.wait()
        # One that stops while a server is away can't settle what it holds; one that has said
        # nothing yet was still being loaded.
        is_early = code == -signal.SIGTERM and not relay.stderr
        assert is_early or code in {0, 1, _NO_DATABASE}, relay.output

    async def restart_ended(self) -> None:
        """As a supervisor does: start again what found no database at its start."""
        for number, relay in tuple(self.running.items()):
            if relay.exit_code is not None:
                assert relay.exit_code == _NO_DATABASE, relay.output
                await self.start(number)


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        for table in ("quick", "slow"):
            await world.make_orders(table)
        yield world


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
async def test_random_kills_of_relays_and_servers_lose_nothing(
    world: RelayWorld,
    postgres_server: PostgresServer,
    nats_server: NatsServer,
    kafka_server: KafkaServer,
    redis_server_with: Callable[..., RedisServer],
    rabbitmq_server: RabbitServer,
    sqs_server: SqsServer,
) -> None:
    # What Redis has answered it must have written, or its own crash loses it.
    redis = redis_server_with("appendfsync always")
    await _make_pipelines(world, nats_server, kafka_server, redis, rabbitmq_server, sqs_server)
    servers: dict[str, ServerControl] = {
        "postgres": postgres_server.control,
        "nats": nats_server.control,
        "kafka": kafka_server.control,
        "redis": redis.control,
        "rabbitmq": rabbitmq_server.control,
    }
    chance = random.Random(SEED)
    summary = Summary()
    relays = Relays(
        world, {f"RELAY_{key.upper()}": value for key, value in sqs_server.keys.items()}
    )
    for number in range(RELAYS):
        await relays.start(number)
    resident_kib: list[int] = []
    started = time.monotonic()
    ends_at = started + SECONDS
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(_watch(world, relays, summary, resident_kib))
        tasks.create_task(_write(world, ends_at, chance))
        await _kill_at_random(relays, servers, ends_at, chance, summary)
        summary.seconds = time.monotonic() - started
        for number in set(range(RELAYS)) - relays.running.keys():
            await relays.start(number)
        await _until_all_arrived(world, summary)
        watching.cancel()
    keys = [event.dedup_key for event in events_in(world.directory / "soak.jsonl")]
    summary.repeated_in_the_file = len(keys) - len(set(keys))
    third = len(resident_kib) // 3
    summary.memory_kib = [
        round(fmean(resident_kib[start : start + third])) for start in (0, third, 2 * third)
    ]
    _report(summary)
    _assert_bounded(summary)


async def _make_pipelines(
    world: RelayWorld,
    nats_server: NatsServer,
    kafka: KafkaServer,
    redis: RedisServer,
    rabbitmq: RabbitServer,
    sqs: SqsServer,
) -> None:
    """A pipeline to each destination, and one from there into the inbox of its name."""
    name = f"soak{os.getpid()}"
    client = await nats.connect(nats_server.url)
    await client.jetstream().add_stream(StreamConfig(name=name, subjects=[f"{name}.>"]))
    await client.close()
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.brokers)
    await admin.start()
    await admin.create_topics([NewTopic(name, 3, 1)])
    await admin.close()
    connection = await aio_pika.connect(rabbitmq.url)
    async with connection, connection.channel() as channel:
        exchange = await channel.declare_exchange(name, aio_pika.ExchangeType.TOPIC, durable=True)
        queue = await channel.declare_queue(name, durable=True)
        await queue.bind(exchange, "#")
    keys = {f"aws_{key}": value for key, value in sqs.keys.items()}
    session = aioboto3.Session(region_name=sqs.region, **keys)
    async with session.client("sqs", endpoint_url=sqs.url) as client:
        queue_url = (await client.create_queue(QueueName=name))["QueueUrl"]
    file = str(world.directory / "soak.jsonl")
    sqs_place = {
        "queue_url": queue_url,
        "region": sqs.region,
        **{key: f"${{env:RELAY_{key.upper()}}}" for key in sqs.keys},
    }
    ways: Mapping[str, tuple[Mapping[str, object], Mapping[str, object]]] = {
        "nats": (
            {"url": nats_server.url, "subject_template": f"{name}.{{op}}"},
            {"url": nats_server.url, "stream": name, "subject": f"{name}.>", "durable_name": name},
        ),
        "kafka": (
            {"brokers": kafka.brokers, "topic": name, "key_template": "{key}"},
            {
                "brokers": kafka.brokers,
                "topic": name,
                "group_id": name,
                "auto_offset_reset": "earliest",
            },
        ),
        "redis": (
            {"url": redis.url, "stream_key": name},
            {"url": redis.url, "stream_key": name, "group_name": name, "start_id": "0"},
        ),
        "rabbitmq": ({"url": rabbitmq.url, "exchange": name}, {"url": rabbitmq.url, "queue": name}),
        "sqs": (sqs_place, {**sqs_place, "visibility_timeout": 10}),
        "webhook": (
            {"url": f"http://{LOOPBACK}:${{env:RELAY_SOAK_PORT}}/soak"},
            {"listen_addr": f"{LOOPBACK}:${{env:RELAY_SOAK_PORT}}", "path": "/soak"},
        ),
        "file": ({"output": file}, {"input": file, "follow": True}),
    }
    for backend, (sink, source) in ways.items():
        await world.reverse(f"from-{backend}", {"type": backend, **source}, backend)
        table = "slow" if backend in SLOW else "quick"
        await world.forward(f"to-{backend}", {"type": backend, **sink}, table)
    await world.run("select pgtrickle.create_inbox('inbox')")
    await world.forward("to-inbox", {"type": "pg-inbox", "inbox": "inbox"}, "quick")


async def _write(world: RelayWorld, ends_at: float, chance: random.Random) -> None:
    """Random statements of random sizes until the time is over, whatever becomes of the server."""
    ids = itertools.count(1, _MOST_ROWS)
    while time.monotonic() < ends_at:
        try:
            connection = await asyncpg.connect(world.database.dsn, timeout=5)
        except (OSError, TimeoutError, asyncpg.PostgresError):
            await asyncio.sleep(0.1)
            continue
        with contextlib.suppress(*_LOST):
            while time.monotonic() < ends_at:
                await _write_some(connection, ids, chance)
                await asyncio.sleep(chance.random() * 0.1)
        connection.terminate()


async def _write_some(
    connection: asyncpg.Connection[asyncpg.Record],
    ids: itertools.count[int],
    chance: random.Random,
) -> None:
    # Now and then more rows than one outbox row holds.
    rows = chance.choice((1, 1, 1, 5, 20, 100)) if chance.random() > 0.002 else _MOST_ROWS
    first = next(ids)
    last = first + rows - 1
    async with connection.transaction():
        await connection.execute(
            "insert into quick (id, note)"
            " select g, repeat('x', 100) from generate_series($1::int, $2::int) as g",
            first,
            last,
        )
        if chance.random() < 0.3:
            await connection.execute(
                "update quick set version = version + 1 where id between $1 and $2", first, last
            )
        if chance.random() < 0.1:
            await connection.execute("delete from quick where id = $1", first)
        if chance.random() < 0.2:
            await connection.execute("insert into slow (id) values ($1)", first)


async def _kill_at_random(
    relays: Relays,
    servers: Mapping[str, ServerControl],
    ends_at: float,
    chance: random.Random,
    summary: Summary,
) -> None:
    """Each server and each relay but the first in random turns, so that all have one soon."""
    targets: list[str | int] = []
    while time.monotonic() < ends_at:
        if not targets:
            targets = [*servers, *range(1, RELAYS), *range(1, RELAYS)]
            chance.shuffle(targets)
        target = targets.pop()
        if isinstance(target, str):
            how = chance.choice(("kill", "stop"))
            await asyncio.to_thread(getattr(servers[target], how))
            try:
                await asyncio.sleep(chance.uniform(*AWAY_S))
            finally:
                await asyncio.to_thread(servers[target].start)
            summary.count_kill(f"{target} {how}")
        else:
            how = chance.choice(("kill", "kill", "stop"))
            await getattr(relays, how)(target)
            await asyncio.sleep(chance.uniform(*AWAY_S))
            await relays.start(target)
            summary.count_kill(f"relay {how}")
        await asyncio.sleep(chance.uniform(*BETWEEN_KILLS_S))


async def _until_all_arrived(world: RelayWorld, summary: Summary) -> None:
    """Every inbox has every event of its outbox, and nothing else. Raises `AssertionError`."""
    started = time.monotonic()
    await world.reconnect()
    counts: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}

    async def is_complete() -> bool:
        for inbox in (*QUICK, *SLOW):
            table = "slow" if inbox in SLOW else "quick"
            expected = tuple(await world.owner.fetchrow(_EXPECTED.format(table=table)) or ())
            arrived = tuple(await world.owner.fetchrow(_ARRIVED.format(inbox=inbox)) or ())
            counts[inbox] = (expected, arrived)
        return all(expected == arrived for expected, arrived in counts.values())

    try:
        await until(is_complete, timeout_s=CATCH_UP_S, every_s=0.5)
    except AssertionError:
        letters = await world.owner.fetch(
            "select pipeline, error, count(*) from pgtrickle.relay_dlq group by 1, 2"
        )
        behind = {inbox: pair for inbox, pair in counts.items() if pair[0] != pair[1]}
        raise AssertionError(
            f"(events, outbox rows) expected and arrived: {behind}; dead letters: {letters}"
        ) from None
    summary.catch_up_s = time.monotonic() - started
    summary.events = sum(expected[0] for expected, _ in counts.values())
    summary.arrived = sum(arrived[0] for _, arrived in counts.values())


async def _watch(
    world: RelayWorld, relays: Relays, summary: Summary, resident_kib: list[int]
) -> None:
    """Memory, open files and connections, once a second, until cancelled."""
    young_until = time.monotonic() + min(YOUNG_S, SECONDS / 3)
    while True:
        await asyncio.sleep(1)
        await relays.restart_ended()
        oldest = relays.running[0].pid
        summary.most_files = max(summary.most_files, _open_files(oldest))
        if time.monotonic() > young_until:
            resident_kib.append(_resident_kib(oldest))
        with contextlib.suppress(OSError, TimeoutError, asyncpg.PostgresError):
            connection = await asyncpg.connect(world.database.dsn, timeout=5)
            try:
                count = await connection.fetchval(_CONNECTIONS, MEMBER)
                summary.most_connections = max(summary.most_connections, count)
            finally:
                connection.terminate()


def _resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1])


def _open_files(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def _report(summary: Summary) -> None:
    text = msgspec.json.format(msgspec.json.encode(summary)).decode()
    print(text)
    if REPORT:
        Path(REPORT).write_text(text)


def _assert_bounded(summary: Summary) -> None:
    assert summary.most_connections <= RELAYS * CONNECTIONS_A_RELAY
    assert summary.most_files <= OPEN_FILES
    _, middle, last = summary.memory_kib
    # In two minutes caches are still filling.
    if SECONDS > 2 * YOUNG_S:
        assert last <= middle * MEMORY_GROWTH, f"memory grew: {summary.memory_kib} KiB"
