"""Relays that share a consumer group, while some of them are killed, stopped and cut off.

`GroupProof` holds the tests; a backend's `TestForward` takes part by inheriting it beside
`ForwardProof`, with the same ``destination``. `Sharing` is what deals the blows.

What is proved is read from two sides: the destination has every event, and the history, which each
relay writes into its log, shows which rows it leased and settled, and when. A row that was settled
is leased to nobody again; one that was leased twice was with a relay that a blow had hit meanwhile.
So without a blow nothing can arrive twice, and after one only with the same key.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from tests.crash.fifty_thousand import Arrived, Destination, Proof, dedup_key
from tests.integration.relay_surroundings import RelayWorld, as_json, port_of, until
from tests.servers.finding import LOOPBACK
from tests.servers.process import RelayProcess
from tests.servers.proxy import TcpProxy

PIPELINE = "p"
GROUP = "sharers"
VISIBILITY_S = 2
TAKEOVER_S = VISIBILITY_S + 2.0
# After a blow is over, until what was in flight then is released.
RECOVERY_S = 3.0
BATCH = 20
# Of each relay: as many that who was woken first is no longer ahead by much.
FAIR_ROWS = 2_000
BOUND_S = 120.0

Proxies = Callable[[str, int], Awaitable[TcpProxy]]


class _Line(msgspec.Struct):
    """A line of a relay's log."""

    ts: datetime
    msg: str
    batch: str = ""
    checkpoint: str = ""


class Lease(msgspec.Struct, eq=False):
    """Rows that a relay had; what is settled has been acknowledged to it."""

    holder: Sharer
    at: float
    ids: Sequence[int]
    settlements: list[tuple[float, int]] = msgspec.field(default_factory=list)

    def is_settled(self, id_: int, before: float = math.inf) -> bool:
        """Whether the relay knew before then that it had settled this row."""
        return any(at < before and id_ <= through for at, through in self.settlements)


@dataclass(eq=False)
class Sharer:
    """One relay, its way to PostgreSQL, and when it was hit, by the clock of its log."""

    name: str
    process: RelayProcess
    postgres: TcpProxy
    blows: list[tuple[float, float]] = field(default_factory=list)

    def was_hit(self, since: float, until_: float) -> bool:
        """Whether a blow fell, or was not got over yet, at some time between."""
        return any(begun <= until_ and since <= over for begun, over in self.blows)

    def leases(self) -> list[Lease]:
        """What its log says that it leased."""
        leases: dict[str, Lease] = {}
        for text in self.process.stderr:
            if '"leased"' not in text and '"settled"' not in text:
                continue
            line = msgspec.json.decode(text, type=_Line)
            if line.msg == "leased":
                leases[line.batch] = Lease(self, line.ts.timestamp(), _ids(line.checkpoint))
            elif line.msg == "settled":
                settlement = (line.ts.timestamp(), int(line.checkpoint))
                leases[line.batch].settlements.append(settlement)
        return list(leases.values())


def _ids(ranges: str) -> list[int]:
    ids: list[int] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        ids += range(int(first), int(last or first) + 1)
    return ids


class Sharing:
    """So many relays of one consumer group, which write down what they do."""

    def __init__(self, world: RelayWorld, destination: Destination, proxies: Proxies) -> None:
        self._world = world
        self._destination = destination
        self._proxies = proxies
        self._written = 0
        self._numbers = itertools.count()
        self._killed: list[tuple[Sharer, float]] = []
        self._way_there: TcpProxy | None = None
        self._cuts: list[tuple[float, float]] = []
        self.relays: list[Sharer] = []

    async def begin(self, relays: int, *, through_a_proxy: bool = False) -> None:
        """The pipeline, and all relays at work in it; its destination may then be cut off."""
        sink = self._destination.sink()
        if through_a_proxy:
            url = str(sink["url"])
            self._way_there = await self._proxies(LOOPBACK, port_of(url))
            sink = {**sink, "url": self._way_there.url(url)}
        await self._world.run(
            "create table public.orders"
            " (id int primary key, customer int not null, note text not null)"
        )
        await self._world.run("select pgtrickle.enable_outbox('orders')")
        config = {
            "source": {"outbox": "orders", "consumer_group": GROUP},
            "sink": sink,
            "batch_size": BATCH,
            "visibility_seconds": VISIBILITY_S,
        }
        await self._world.run(
            "select pgtrickle.set_relay_outbox($1, $2::text::jsonb)", PIPELINE, as_json(config)
        )
        await asyncio.gather(*(self.start() for _ in range(relays)))

    async def start(self) -> None:
        """One more relay."""
        name = f"relay{next(self._numbers)}"
        proxy = await self._proxies(LOOPBACK, port_of(self._world.member_dsn))
        process = await self._world.relay(
            "log=json",
            "log.level=debug",
            f"relay.worker_id={name}",
            dsn=proxy.url(self._world.member_dsn),
            is_awaited=False,
        )
        await process.wait_for_log('"state":"running"', timeout_s=BOUND_S)
        self.relays.append(Sharer(name, process, proxy))

    async def write(self, count: int) -> None:
        """So many rows of the outbox, which become visible at once."""
        await self._world.run(
            f"do $$ begin for n in {self._written + 1} .. {self._written + count} loop"
            " insert into orders values (n, n % 97, repeat('x', 100)); end loop; end $$"
        )
        self._written += count

    async def write_and_catch(self, victim: Sharer, count: int) -> None:
        """Write, and wait until the victim has some of it in hand."""
        since = len(victim.process.stderr)
        await self.write(count)
        await victim.process.wait_for_log('"leased"', since=since, timeout_s=BOUND_S)

    async def until_settled(self) -> None:
        """Everything is delivered, and nobody has anything in hand."""

        async def is_settled() -> bool:
            query = "select lag_rows = 0 from pgtrickle.relay_lag('default', array[$1])"
            return bool(await self._world.value(query, PIPELINE))

        await until(is_settled, timeout_s=BOUND_S, every_s=0.05)

    async def kill(self, victim: Sharer) -> None:
        """SIGKILL; what it had is another's in time."""
        await victim.process.kill()
        now = time.time()
        victim.blows.append((now, float("inf")))
        self._killed.append((victim, now))
        await self.until_settled()

    async def stop(self, victim: Sharer) -> None:
        """SIGSTOP for longer than its lease."""
        begun = time.time()
        victim.process.send_signal(signal.SIGSTOP)
        await self.until_settled()
        victim.process.send_signal(signal.SIGCONT)
        victim.blows.append((begun, time.time() + RECOVERY_S))

    async def cut(self, victim: Sharer) -> None:
        """All of its connections to PostgreSQL break."""
        begun = time.time()
        await victim.postgres.reset_connections()
        await self.until_settled()
        victim.blows.append((begun, time.time() + RECOVERY_S))

    async def cut_destination(self, count: int) -> None:
        """Nobody reaches the destination for longer than a lease, while rows are in hand."""
        way_there = self._way_there
        assert way_there is not None
        begun = time.time()
        await way_there.reset_connections()
        await self.write(count)
        await self.until_settled()
        await way_there.cut()
        await self.write(count)

        async def is_held_for_long() -> bool:
            query = (
                "select count(distinct split_part(consumer_id, '/', 1)) = $1"
                " from pgtrickle.relay_group_leases where now() > leased_at + $2 * interval '1 s'"
            )
            return bool(await self._world.value(query, len(self.relays), VISIBILITY_S * 1.5))

        await until(is_held_for_long, timeout_s=BOUND_S)
        await way_there.restore()
        await self.until_settled()
        self._cuts.append((begun, time.time()))

    async def restart_postgres(self) -> None:
        """PostgreSQL goes away for all of them, and comes back."""
        begun = time.time()
        await asyncio.to_thread(self._world.database.server.restart)
        await self._world.reconnect()
        await self.until_settled()
        for relay in self.relays:
            relay.blows.append((begun, time.time() + RECOVERY_S))

    async def assert_nothing_is_lost_or_repeated_without_a_blow(self) -> None:
        """See the module."""
        await self.until_settled()
        rows = await self._world.owner.fetch("select id, refresh_id from pgtrickle.outbox_orders")
        events = await self._destination.events()
        copies: dict[str, list[Arrived]] = defaultdict(list)
        for event in events:
            copies[event.dedup_key].append(event)
        assert copies.keys() == {dedup_key(row["id"], 0, row["refresh_id"]) for row in rows}
        assert {event.id for event in events} == set(range(1, self._written + 1))
        for same in copies.values():
            assert all(event == same[0] for event in same)
        leased_twice = self._assert_every_second_lease_has_a_reason()
        repeated = {int(key.split(":")[1]) for key, same in copies.items() if len(same) > 1}
        assert repeated <= leased_twice | self._held_while_the_destination_was_cut_off()
        self._assert_takeover_in_time()

    def _assert_every_second_lease_has_a_reason(self) -> set[int]:
        """The rows that were leased more than once."""
        of_row: dict[int, list[Lease]] = defaultdict(list)
        for lease in self._leases():
            for id_ in lease.ids:
                of_row[id_].append(lease)
        assert len(of_row) == self._written
        for id_, leases in of_row.items():
            leases.sort(key=lambda lease: lease.at)
            for former, latter in itertools.pairwise(leases):
                told = f"row {id_}: {former.holder.name} at {former.at}, {latter.holder.name}"
                # One that a blow has hit may have written down late what it leased before.
                is_late = latter.holder.was_hit(former.at, latter.at)
                assert is_late or not former.is_settled(id_, latter.at), f"{told}: settled before"
                is_due = is_late or former.holder.was_hit(former.at, latter.at)
                assert is_due, f"{told} at {latter.at}: why?"
        return {id_ for id_, leases in of_row.items() if len(leases) > 1}

    def _held_while_the_destination_was_cut_off(self) -> set[int]:
        """What may have arrived without an answer; its lease is no reason to lease it again."""
        return {
            id_
            for lease in self._leases()
            for begun, over in self._cuts
            if begun <= lease.at <= over
            for id_ in lease.ids
        }

    def _assert_takeover_in_time(self) -> None:
        for victim, at in self._killed:
            open_ids = {
                id_ for lease in victim.leases() for id_ in lease.ids if not lease.is_settled(id_)
            }
            later = [
                lease.at - at
                for lease in self._leases()
                if lease.holder is not victim and lease.at >= at and open_ids & set(lease.ids)
            ]
            assert max(later, default=0.0) <= TAKEOVER_S, later

    def assert_shared_fairly(self) -> None:
        """Each relay has settled at least half of its fair share of all that was written."""
        settled = Counter(
            {relay: sum(len(lease.ids) for lease in relay.leases()) for relay in self.relays}
        )
        fair = self._written / len(self.relays)
        shares = {relay.name: count for relay, count in settled.items()}
        assert min(shares.values()) >= fair / 2, shares

    def _leases(self) -> Iterator[Lease]:
        for relay in self.relays:
            yield from relay.leases()


class GroupProof(Proof):
    """Two relays of a consumer group lose nothing on the way to a ``destination``."""

    async def test_two_relays_of_a_group_of_which_one_is_killed(
        self, world: RelayWorld, destination: Destination, tcp_proxy: Proxies
    ) -> None:
        sharing = Sharing(world, destination, tcp_proxy)
        await sharing.begin(2)
        await sharing.write(FAIR_ROWS)
        await sharing.until_settled()
        sharing.assert_shared_fairly()

        await sharing.write_and_catch(sharing.relays[0], 400)
        await sharing.kill(sharing.relays[0])

        await sharing.assert_nothing_is_lost_or_repeated_without_a_blow()
