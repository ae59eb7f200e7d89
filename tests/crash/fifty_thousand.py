"""Fifty thousand events through the real relay, which is killed, and whose broker goes away.

`ForwardProof` and `ReverseProof` hold the tests. A backend has one file, ``test_<backend>.py``,
that subclasses them as `TestForward` and `TestReverse` and supplies one fixture each:

- ``destination``, a `Destination`: where the events of an outbox go. It says which sink leads
  there, how many events are there by now, gives all of them in the order in which they arrived,
  takes the server away in one of two ways and brings it back with what it had stored.
- ``origin``, an `Origin`: where messages come from. It says which source leads there, puts
  messages there whose payload is ``{"id": n, …}`` and takes the server away and brings it back.

Both start empty, have a broker of the test's own (a fresh stream, topic, queue, file), and are
taken down by their fixture. A server of the session may be used; it is up again when a test ends.
Where there is no server that keeps anything, the broker is taken away by the cutting proxy or by
stopping the listener; where there is no broker but a file, PostgreSQL goes away instead.

What the tests do with them: events are written in slices, and a blow falls when some of a slice
have arrived and others have not. That is observed and never hoped for: a slice that was through
before the blow is followed by another. In the end there are at least fifty thousand events; each
has arrived, a repetition is equal to the event it repeats, and events of a key came first in their
order. An inbox has each message once. A broker that takes minutes for so many says with
``event_count`` how many it gets.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, Protocol
from zlib import crc32

import msgspec
import pytest

from tests.integration.relay_surroundings import (
    RelayWorld,
    StartProcess,
    relay_world,
    until,
)
from tests.servers.postgres import Database
from tests.servers.process import RelayProcess

EVENTS: Final = 50_000
BOUND_S: Final = 300.0
PIPELINE: Final = "p"
INBOX: Final = "arrived"

Blow = Literal["stop", "kill"]

# Each kill falls when this part of its slice, or more, has arrived.
_KILLS_AFTER: Final = (0.0, 0.15, 0.3, 0.45)
_SLICES: Final = len(_KILLS_AFTER) + 1
_OUTAGES: Final[tuple[Blow, ...]] = ("stop", "kill")
_OUTAGE_AFTER: Final = 0.2
_HELD_BACK: Final = 0.1
_ATTEMPTS: Final = 10
_BATCH: Final = 500
_CUSTOMERS: Final = 97

# Rows of one statement, which is one row of the outbox; the largest is a claim check.
_STATEMENT_ROWS: Final = (*(1,) * 20, *(10,) * 10, *(100,) * 5, 400, 1_500)


class Arrived(msgspec.Struct, frozen=True):
    """An event as the destination holds it; ``content``: all of it, to compare repetitions."""

    dedup_key: str
    key: str | None
    id: int
    content: bytes


class _Row(msgspec.Struct, frozen=True):
    id: int


class _Envelope(msgspec.Struct, frozen=True):
    dedup_key: str
    payload: _Row
    key: str | None = None


_decode_envelope = msgspec.json.Decoder(_Envelope).decode


def arrived(envelope: bytes) -> Arrived:
    """What an event in the format ``envelope`` is to the proof."""
    event = _decode_envelope(envelope)
    return Arrived(event.dedup_key, event.key, event.payload.id, envelope)


def dedup_key(outbox_id: int, index: int, refresh_id: object) -> str:
    """The key of one event of the outbox of `orders`."""
    return f"outbox_orders:{outbox_id}:{index}:{crc32(str(refresh_id).encode()):08x}"


class Destination(Protocol):
    """Where the events of an outbox arrive, looked at past the relay.

    ``deduplicates``: a repetition is stored once. ``keeps_order``: events of a key are found in
    their order. ``is_apart_from_postgres``: the outbox can be written while it is away.
    ``event_count``: how many it gets, or more.
    """

    event_count: int = EVENTS
    deduplicates: bool = False
    keeps_order: bool = True
    is_apart_from_postgres: bool = True

    def sink(self) -> Mapping[str, object]:
        """The sink of the pipeline."""
        ...

    async def count(self) -> int:
        """How many events are there, repetitions included. Quick; never asked while away."""
        ...

    async def events(self) -> Sequence[Arrived]:
        """All of them, repetitions included, in the order in which they arrived."""
        ...

    async def take_away(self, blow: Blow) -> None:
        """Make it unreachable: in order, or as if it crashed."""
        ...

    async def bring_back(self) -> None:
        """Make it reachable on the same address, with what it had accepted."""
        ...


class Origin(Protocol):
    """Where messages come from, filled past the relay.

    ``keeps``: what was put stays there until a relay fetches it. Without that `put` ends when a
    relay has accepted the messages, and lives through outages by repeating what was not accepted.
    ``event_count``: how many messages it gets, or more.
    """

    event_count: int = EVENTS
    keeps: bool = True

    def source(self) -> Mapping[str, object]:
        """The source of the pipeline."""
        ...

    async def put(self, ids: Sequence[int]) -> None:
        """Put a message with the payload of `payload` for each id, in this order."""
        ...

    async def take_away(self, blow: Blow) -> None:
        """Make it unreachable: in order, or as if it crashed."""
        ...

    async def bring_back(self) -> None:
        """Make it reachable on the same address, with what it held."""
        ...

    async def until_missed(self, world: RelayWorld, relay: RelayProcess) -> None:
        """Wait until somebody has noticed that it is away."""
        await until_not_running(world, relay)


def payload(id_: int) -> bytes:
    """The body of a message."""
    return b'{"id":%d,"customer":%d,"note":"%b"}' % (id_, id_ % _CUSTOMERS, b"x" * 100)


async def until_not_running(world: RelayWorld, relay: RelayProcess) -> None:
    """Wait until the relay says that its pipeline is not running."""

    async def is_elsewhere() -> bool:
        state = await world.state(relay, PIPELINE)
        return state is None or state.state != "running"

    await until(is_elsewhere, timeout_s=BOUND_S)


class _Flow(Protocol):
    """One direction, as the scenarios see it."""

    world: RelayWorld
    keeps: bool
    event_count: int

    async def write(self, ids: range) -> None:
        """Write events with these ids where the pipeline begins."""
        ...

    async def write_while_away(self, first: int, count: int) -> int:
        """Write so many more behind the broker's back where that is possible; how many."""
        ...

    async def count(self) -> int:
        """How many have arrived, repetitions included."""
        ...

    async def take_away(self, blow: Blow) -> None:
        """Take the broker away."""
        ...

    async def until_missed(self, relay: RelayProcess) -> None:
        """Wait until that was noticed."""
        ...

    async def bring_back(self) -> None:
        """Bring the broker back."""
        ...


class _Scenario:
    """Writes slices and deals blows; ``written`` is how many events there are."""

    def __init__(self, flow: _Flow, writers: asyncio.TaskGroup) -> None:
        self._flow = flow
        self._writers = writers
        self._slice = flow.event_count // _SLICES
        self.written = 0

    async def relay(self) -> RelayProcess:
        """A relay at work."""
        return await self._flow.world.relay(f"relay.batch_size={_BATCH}")

    async def write(self, count: int) -> None:
        """Write so many more; what its origin does not keep is written while things go on."""
        ids = range(self.written + 1, self.written + count + 1)
        self.written += count
        writer = self._writers.create_task(self._flow.write(ids))
        if self._flow.keeps:
            await writer

    async def kill_a_relay_at_work(self, after: float) -> bool:
        """Write a slice and kill a relay in the middle of it; False when it was through before."""
        before = await self._flow.count()
        await self.write(self._slice)
        relay = await self.relay()
        await self._until_arrived(before + max(1, round(after * self._slice)))
        await relay.kill()
        return await self._flow.count() < self.written

    async def take_the_broker_away(self, relay: RelayProcess, blow: Blow) -> bool:
        """Write a slice and take the broker away in the middle; False when it was through."""
        before = await self._flow.count()
        await self._flow.world.run("select pgtrickle.disable_relay($1)", PIPELINE)
        await self.write(self._slice)
        await self._flow.world.run("select pgtrickle.enable_relay($1)", PIPELINE)
        await self._until_arrived(before + round(_OUTAGE_AFTER * self._slice))
        await self._flow.take_away(blow)
        try:
            held_back = round(_HELD_BACK * self._slice)
            self.written += await self._flow.write_while_away(self.written + 1, held_back)
            await self._flow.until_missed(relay)
        finally:
            await self._flow.bring_back()
        return await self._flow.count() < self.written

    async def write_the_rest(self) -> None:
        """Complete the fifty thousand."""
        if self.written < self._flow.event_count:
            await self.write(self._flow.event_count - self.written)

    async def _until_arrived(self, count: int) -> None:
        async def is_there() -> bool:
            return await self._flow.count() >= count

        await until(is_there, timeout_s=BOUND_S, every_s=0.01)


async def _killed_again_and_again(flow: _Flow) -> int:
    """Kill relays at work, then let one finish; how many events were written."""
    async with asyncio.timeout(BOUND_S), asyncio.TaskGroup() as writers:
        scenario = _Scenario(flow, writers)
        for after in _KILLS_AFTER:
            for _ in range(_ATTEMPTS):
                if await scenario.kill_a_relay_at_work(after):
                    break
            else:
                pytest.fail("no relay could be killed at work")
        await scenario.write_the_rest()
        await scenario.relay()
    return scenario.written


async def _with_outages(flow: _Flow) -> int:
    """Take the broker away while a relay is at work; how many events were written."""
    async with asyncio.timeout(BOUND_S), asyncio.TaskGroup() as writers:
        scenario = _Scenario(flow, writers)
        relay = await scenario.relay()
        for blow in _OUTAGES:
            for _ in range(_ATTEMPTS):
                if await scenario.take_the_broker_away(relay, blow):
                    break
            else:
                pytest.fail("the broker never went away in the middle")
        await scenario.write_the_rest()
    assert relay.returncode is None, relay.output
    return scenario.written


class _Forward:
    """From an outbox to a destination."""

    keeps = True

    def __init__(self, world: RelayWorld, destination: Destination) -> None:
        self.world = world
        self.event_count = destination.event_count
        self._destination = destination
        self._sizes = itertools.cycle(_STATEMENT_ROWS)

    async def prepare(self) -> None:
        await self.world.run(
            "create table public.orders"
            " (id int primary key, customer int not null, note text not null)"
        )
        await self.world.run("select pgtrickle.enable_outbox('orders')")
        await self.world.forward(PIPELINE, self._destination.sink(), key_columns=["customer"])

    async def write(self, ids: range) -> None:
        for part in _parts(ids, self._sizes):
            await self.world.run(
                "insert into orders select n, n % $3::int, repeat('x', 100)"
                " from generate_series($1::int, $2::int) n",
                *(part.start, part.stop - 1, _CUSTOMERS),
            )

    async def write_while_away(self, first: int, count: int) -> int:
        if not self._destination.is_apart_from_postgres:
            return 0
        await self.write(range(first, first + count))
        return count

    async def count(self) -> int:
        return await self._destination.count()

    async def take_away(self, blow: Blow) -> None:
        await self._destination.take_away(blow)

    async def until_missed(self, relay: RelayProcess) -> None:
        await until_not_running(self.world, relay)

    async def bring_back(self) -> None:
        await self._destination.bring_back()

    async def assert_nothing_is_lost(self, written: int) -> None:
        """Each event is there, its repetitions are equal, and each key's events are in order."""
        rows = await self.world.owner.fetch(
            "select id, refresh_id, inserted_count from pgtrickle.outbox_orders order by id"
        )
        expected = {
            dedup_key(row["id"], index, row["refresh_id"])
            for row in rows
            for index in range(row["inserted_count"])
        }
        assert len(expected) == written

        async def complete() -> Sequence[Arrived] | None:
            if await self.count() < written:
                return None
            events = await self._destination.events()
            return events if expected <= {event.dedup_key for event in events} else None

        events = await until(complete, timeout_s=BOUND_S, every_s=0.1)
        first: dict[str, Arrived] = {}
        for event in events:
            assert first.setdefault(event.dedup_key, event) == event
        assert first.keys() == expected
        assert {event.id for event in first.values()} == set(range(1, written + 1))
        if self._destination.keeps_order:
            _assert_order_of_each_key(first.values())
        if self._destination.deduplicates:
            assert len(events) == written
        await _assert_no_dead_letters(self.world)


class _Reverse:
    """From an origin to an inbox."""

    def __init__(self, world: RelayWorld, origin: Origin) -> None:
        self.world = world
        self.keeps = origin.keeps
        self.event_count = origin.event_count
        self._origin = origin

    async def prepare(self) -> None:
        await self.world.reverse(PIPELINE, self._origin.source(), INBOX)

    async def write(self, ids: range) -> None:
        await self._origin.put(ids)

    async def write_while_away(self, first: int, count: int) -> int:  # noqa: ARG002 - nothing can be
        return 0

    async def count(self) -> int:
        return int(str(await self.world.value(f"select count(*) from pgtrickle.{INBOX}")))

    async def take_away(self, blow: Blow) -> None:
        await self._origin.take_away(blow)

    async def until_missed(self, relay: RelayProcess) -> None:
        await self._origin.until_missed(self.world, relay)

    async def bring_back(self) -> None:
        await self._origin.bring_back()

    async def assert_nothing_is_lost(self, written: int) -> None:
        """The inbox has each message, and has it once."""

        async def complete() -> bool:
            return await self.count() >= written

        await until(complete, timeout_s=BOUND_S)
        rows = await self.world.owner.fetch(
            f"select (payload ->> 'id')::int as id from pgtrickle.{INBOX} order by 1"
        )
        assert [row["id"] for row in rows] == list(range(1, written + 1))
        await _assert_no_dead_letters(self.world)


class Proof:
    """What both directions have in common."""

    @pytest.fixture
    async def world(
        self, migrated_database: Database, tmp_path: Path, relay_process: StartProcess
    ) -> AsyncIterator[RelayWorld]:
        async with relay_world(migrated_database, tmp_path, relay_process) as world:
            yield world


class ForwardProof(Proof):
    """Nothing is lost on the way from an outbox to a ``destination``."""

    async def test_fifty_thousand_events_survive_a_relay_that_is_killed_again_and_again(
        self, world: RelayWorld, destination: Destination
    ) -> None:
        flow = _Forward(world, destination)
        await flow.prepare()

        written = await _killed_again_and_again(flow)

        await flow.assert_nothing_is_lost(written)

    async def test_fifty_thousand_events_survive_a_broker_that_goes_away(
        self, world: RelayWorld, destination: Destination
    ) -> None:
        flow = _Forward(world, destination)
        await flow.prepare()

        written = await _with_outages(flow)

        await flow.assert_nothing_is_lost(written)


class ReverseProof(Proof):
    """Nothing is lost on the way from an ``origin`` to an inbox, and nothing is there twice."""

    async def test_fifty_thousand_messages_survive_a_relay_that_is_killed_again_and_again(
        self, world: RelayWorld, origin: Origin
    ) -> None:
        flow = _Reverse(world, origin)
        await flow.prepare()

        written = await _killed_again_and_again(flow)

        await flow.assert_nothing_is_lost(written)

    async def test_fifty_thousand_messages_survive_a_broker_that_goes_away(
        self, world: RelayWorld, origin: Origin
    ) -> None:
        flow = _Reverse(world, origin)
        await flow.prepare()

        written = await _with_outages(flow)

        await flow.assert_nothing_is_lost(written)


def _parts(ids: range, sizes: Iterator[int]) -> Iterator[range]:
    """The ids in runs of these sizes; the last is cut."""
    start = ids.start
    while start < ids.stop:
        stop = min(ids.stop, start + next(sizes))
        yield range(start, stop)
        start = stop


def _assert_order_of_each_key(first_occurrences: Iterable[Arrived]) -> None:
    last: dict[str | None, tuple[int, int]] = {}
    for event in first_occurrences:
        _, outbox_id, index, _ = event.dedup_key.split(":")
        position = (int(outbox_id), int(index))
        assert last.get(event.key, (0, 0)) < position, f"{event.dedup_key} is behind its successor"
        last[event.key] = position


async def _assert_no_dead_letters(world: RelayWorld) -> None:
    letters = await world.owner.fetch("select error from pgtrickle.relay_dlq_list() limit 3")
    assert [letter["error"] for letter in letters] == []
