"""A pipeline with partitions whose relays are killed and stopped, and whose readers change.

The destination is a Redis stream, which stores every repetition: where some are left out, as by the
duplicate window of JetStream, the order of what is stored is not the order in which it was sent.
What is proved there: every event has arrived,
a repetition is equal to what it repeats, and no event of a key is ever followed by anything but a
repetition of what came before it or its own successor. So whoever folds the events by key is right
whenever they look, and ends with the last.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
from collections import defaultdict
from collections.abc import AsyncIterator

import asyncpg
import msgspec
import pytest

from tests.contract.redis_broker import Broker
from tests.crash.fifty_thousand import Proof
from tests.integration.relay_surroundings import Event, RelayWorld, until
from tests.servers.process import RelayProcess
from tests.servers.redis import RedisServer

PIPELINE = "orders-out"
WRITERS = 3
CUSTOMERS = 40
BETWEEN_BLOWS = 120
BOUND_S = 60.0
BEGINS = "its readers start from one position"
SEED = 13


@pytest.fixture
async def stream(redis_server: RedisServer) -> AsyncIterator[Broker]:
    stream = Broker(redis_server, "dealt")
    await stream.drop()
    yield stream
    await stream.drop()


class Writers:
    """Customers' orders, each customer's in order; transactions overlap, and some roll back."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._is_over = asyncio.Event()
        self.written: dict[int, int] = defaultdict(int)

    async def run(self) -> None:
        """Write until stopped."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(WRITERS):
                tasks.create_task(self._write(number))

    def stop(self) -> None:
        self._is_over.set()

    async def until_written(self, more: int) -> None:
        """Wait until so many more events are committed."""
        count = sum(self.written.values()) + more

        async def is_written() -> bool:
            return sum(self.written.values()) >= count

        await until(is_written, timeout_s=BOUND_S)

    async def _write(self, number: int) -> None:
        chance = random.Random(SEED + number)
        connection = await asyncpg.connect(self._dsn)
        own = range(number, CUSTOMERS, WRITERS)
        try:
            while not self._is_over.is_set():
                transaction = connection.transaction()
                await transaction.start()
                customers = chance.sample(own, chance.randrange(1, 4))
                for customer in customers:
                    await connection.execute(
                        "insert into orders (customer, n) values ($1, $2)",
                        customer,
                        self.written[customer] + 1,
                    )
                # A gap for whoever reads meanwhile.
                await asyncio.sleep(chance.choice((0, 0, 0.01, 0.05)))
                if chance.random() < 0.1:
                    await transaction.rollback()
                    continue
                await transaction.commit()
                for customer in customers:
                    self.written[customer] += 1
        finally:
            await connection.close()


async def deal(world: RelayWorld, stream: Broker, partitions: int) -> None:
    await world.forward(
        PIPELINE,
        {"type": "redis", "url": stream.server.url, "stream_key": stream.stream},
        partitions=partitions,
        key_columns=["customer"],
        batch_size=20,
    )


async def spread(world: RelayWorld) -> list[tuple[str, str | None]]:
    """Each reader with the relay that has it."""
    rows = await world.owner.fetch(
        "select pipeline, worker_id from pgtrickle.relay_lag('default', array[$1])", PIPELINE
    )
    return [(row["pipeline"], row["worker_id"]) for row in rows]


async def until_spread(world: RelayWorld, readers: int, relays: int) -> None:
    """Wait until so many readers are owned by so many relays, each a fair share."""

    async def is_spread() -> bool:
        owners = [worker for _, worker in await spread(world)]
        counts = [owners.count(worker) for worker in {*owners} - {None}]
        return (
            len(owners) == readers
            and None not in owners
            and len(counts) == relays
            and max(counts) - min(counts) <= 1
        )

    await until(is_spread, timeout_s=BOUND_S)


async def length(stream: Broker) -> int:
    return int(str(await stream.ask("XLEN", stream.stream)))


async def until_more(stream: Broker) -> None:
    """Wait until the stream has moved on."""
    count = await length(stream) + BETWEEN_BLOWS

    async def has_moved() -> bool:
        return await length(stream) >= count

    await until(has_moved, timeout_s=BOUND_S)


def assert_nothing_is_lost_or_overtaken(events: list[Event], written: dict[int, int]) -> None:
    came: dict[int, list[int]] = defaultdict(list)
    keys: dict[tuple[int, int], Event] = {}
    for event in events:
        customer, n = int(str(event.payload["customer"])), int(str(event.payload["n"]))
        came[customer].append(n)
        assert keys.setdefault((customer, n), event) == event
    assert len({event.dedup_key for event in keys.values()}) == len(keys)
    for customer, last in written.items():
        assert set(came[customer]) == set(range(1, last + 1)), customer
        assert came[customer][0] == 1
        for former, latter in itertools.pairwise(came[customer]):
            assert latter <= former + 1, f"customer {customer}: {latter} came behind {former}"
        assert came[customer][-1] == last


class TestPartitions(Proof):
    async def test_order_per_key_survives_kills_handovers_and_changes_of_the_number_of_readers(
        self, world: RelayWorld, stream: Broker
    ) -> None:
        await world.run(
            "create table public.orders (id bigint generated always as identity primary key,"
            " customer int not null, n int not null)"
        )
        await world.run("select pgtrickle.enable_outbox('orders')")
        await deal(world, stream, 4)
        names = itertools.count()

        async def relay() -> RelayProcess:
            return await world.relay(f"relay.worker_id=relay{next(names)}")

        first, second = await asyncio.gather(relay(), relay())
        await until_spread(world, 4, 2)
        writers = Writers(world.database.dsn)
        writing = asyncio.create_task(writers.run())

        await until_more(stream)
        # Nothing begins as long as a reader of before is only held up.
        since = len(first.stderr)
        second.send_signal(signal.SIGSTOP)
        await deal(world, stream, 2)
        await first.wait_for_log("gave up", since=since)
        await writers.until_written(BETWEEN_BLOWS)
        assert not any(BEGINS in line for line in first.stderr)
        second.send_signal(signal.SIGCONT)
        await until_spread(world, 2, 2)
        await until_more(stream)
        await first.kill()
        await until_more(stream)
        # Handed over by the one that is left, while the readers become others.
        third = await relay()
        await deal(world, stream, 5)
        await until_spread(world, 5, 2)
        await until_more(stream)
        # Killed in the middle of a change, whoever brings the readers together.
        await deal(world, stream, 3)
        await second.kill()
        await until_spread(world, 3, 1)
        await until_more(stream)
        # One, and four again before anybody has noticed.
        await deal(world, stream, 1)
        await deal(world, stream, 4)
        await until_more(stream)
        for partitions in (1, 4):
            await deal(world, stream, partitions)
            await until_spread(world, partitions, 1)
        await until_more(stream)
        writers.stop()
        await writing

        async def is_drained() -> bool:
            # A gap is left for another look while all above it is delivered already.
            behind = (
                "select sum(lag_rows) + sum(pending_gaps) = 0"
                " from pgtrickle.relay_lag('default', array[$1])"
            )
            return bool(await world.value(behind, PIPELINE))

        await until(is_drained, timeout_s=BOUND_S)
        assert await third.terminate() == 0
        entries = await stream.entries()
        events = [msgspec.json.decode(fields[b"payload"], type=Event) for _, fields in entries]
        assert_nothing_is_lost_or_overtaken(events, writers.written)
        print(f"{len(events)} arrivals of {sum(writers.written.values())} events")
