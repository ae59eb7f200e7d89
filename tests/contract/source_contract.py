"""The contract of sources as tests; every backend's source passes them against its real broker.

A backend subclasses `SourceContract` as `Test<Name>Source`, sets ``backend`` and ``lacks``, and
supplies a fixture ``harness`` that yields a `SourceHarness` over a broker of the test's own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

import pytest

from relay.contracts import Batch, Measuring, Source
from relay.errors import AuthenticationRefused, ConfigurationError, MessageRejected, Outage
from relay.message import RelayMessage
from tests.contract.evidence import (
    BAD_BODIES,
    BOUND_S,
    CLOSED_WITHIN_S,
    LOOKS_LIKE_AN_ENVELOPE,
    SERIALIZED_FIELDS,
    Belongings,
    Contract,
    DriverErrors,
    assert_every_exception_is_mapped,
    assert_same_message,
    complete_message,
    dedup_keys,
    first_occurrences,
    lacking,
    numbered,
    reconnect,
    shows,
)

IDLE_POLL_S = 1.0
MARGIN_S = 0.7
"""What a busy machine may add to a wait."""

AT_ONCE_S = 5.0
"""Well below the time after which brokers redeliver by themselves (30 s in the harnesses)."""


class SourceHarness(DriverErrors, Protocol):
    """One source's broker and how to disturb it.

    What belongs to a lacking evidence is never called; a harness that subclasses this protocol
    inherits bodies that say so.
    """

    @property
    def carries(self) -> frozenset[str]:
        """The fields of a message that come back unchanged."""
        return SERIALIZED_FIELDS

    @property
    def keeps_order_over_outages(self) -> bool:
        """False where what was in flight in an outage may come later than what is behind it."""
        return True

    @property
    def idle_poll_s(self) -> float:
        """How long a poll may wait that finds nothing, behind one that has found nothing."""
        return IDLE_POLL_S

    def make(self, *, batch_size: int = 100) -> Source:
        """A source on this test's broker, not connected.

        Every source of one harness stands for the same pipeline, so that a second one resumes
        from what the first acknowledged. Time until the broker redelivers by itself: 30 s or
        more, never at once.
        """
        ...

    async def feed(self, messages: Sequence[RelayMessage]) -> None:
        """Put messages on the broker as our own sink would, in order; durable when it returns."""
        ...

    async def feed_bodies(self, bodies: Sequence[bytes]) -> Sequence[bytes]:
        """Put plain bodies there, as somebody else would, in order.

        Returns those that this transport can hold (a line-based file holds no line break).
        """
        ...

    async def cut(self) -> None:
        """Break the connection and let nobody connect until `restore` (evidence ``reconnect``)."""
        raise lacking("reconnect")

    async def stall(self) -> None:
        """Let nothing through any more, without breaking the connection, until `restore`."""
        raise lacking("reconnect")

    async def restore(self) -> None:
        """Let connections through again; idempotent (evidence ``reconnect``)."""
        raise lacking("reconnect")

    async def restart(self) -> None:
        """Stop the server and start it, with what it had stored (evidence ``restart``)."""
        raise lacking("restart")

    def make_short_lived(self) -> tuple[Source, float]:
        """A source and after how many seconds its broker takes back a batch that nobody keeps
        alive, which must be 3 at most (evidence ``keep alive``)."""
        raise lacking("keep alive")

    async def make_tls(self, *, trusted: bool) -> Source:  # noqa: ARG002 - for the harnesses
        """A source on a TLS server whose authority it trusts, or not (evidence ``tls``)."""
        raise lacking("tls")

    async def make_unauthorized(self) -> Source:
        """A source with credentials that the server refuses (evidence ``authentication``)."""
        raise lacking("authentication")


async def collect(source: Source, count: int, *, timeout_s: float = BOUND_S) -> list[Batch]:
    """Poll until so many messages, refused ones included, were handed out.

    Gives the batches without the empty ones. Raises TimeoutError.
    """
    batches: list[Batch] = []
    missing = count
    async with asyncio.timeout(timeout_s):
        while missing > 0:
            batch = await source.poll()
            missing -= len(batch.messages) + len(batch.rejected)
            if not batch.is_empty:
                batches.append(batch)
    return batches


async def collect_through_outages(
    source: Source, count: int, into: list[Batch], *, acknowledge: bool
) -> None:
    """Poll as the loop does, reconnecting, until so many different messages were handed out."""
    async with asyncio.timeout(BOUND_S):
        while len({message.dedup_key for message in messages_of(into)}) < count:
            try:
                batch = await source.poll()
                if batch.is_empty:
                    continue
                into.append(batch)
                if acknowledge:
                    await source.acknowledge(batch)
            except Outage:
                await reconnect(source.connect)


def messages_of(batches: Sequence[Batch]) -> list[RelayMessage]:
    """The good messages of all batches, in order."""
    return [message for batch in batches for message in batch.messages]


async def assert_nothing_more(source: Source) -> None:
    """Fail where the next two polls bring anything."""
    for _ in range(2):
        batch = await source.poll()
        assert not batch.messages
        assert not batch.rejected


async def until_lag(source: Source, messages: int) -> None:
    """Wait until the lag is this; some brokers count only now and then. Raises TimeoutError."""
    assert isinstance(source, Measuring)
    async with asyncio.timeout(BOUND_S):
        while await source.lag() != messages:
            await source.poll()


class SourceContract(Contract):
    """What every source keeps."""

    direction = "reverse"
    can_be_lacking = frozenset(
        {
            "reconnect",
            "restart",
            "keep alive",
            "tls",
            "authentication",
            "round trip",
            "stable keys of plain payloads",
            "lag",
        }
    )

    @shows("order")
    async def test_messages_are_handed_out_completely_and_in_order(
        self, harness: SourceHarness
    ) -> None:
        messages = numbered(350)
        await harness.feed(messages)
        source = harness.make(batch_size=100)
        await source.connect()

        batches = await collect(source, 350)

        assert dedup_keys(messages_of(batches)) == dedup_keys(messages)
        assert all(len(batch.messages) <= 100 for batch in batches)
        await source.aclose()

    @shows("order")
    async def test_what_arrives_while_a_poll_waits_is_handed_out(
        self, harness: SourceHarness
    ) -> None:
        source = harness.make()
        await source.connect()

        async with asyncio.timeout(BOUND_S), asyncio.TaskGroup() as tasks:
            collecting = tasks.create_task(collect(source, 20))
            for start in range(0, 20, 5):
                await harness.feed(numbered(5, start=start))

        assert dedup_keys(messages_of(collecting.result())) == dedup_keys(numbered(20))
        await source.aclose()

    @shows("at least once")
    async def test_what_was_not_acknowledged_is_handed_out_again_to_a_new_source(
        self, harness: SourceHarness
    ) -> None:
        await harness.feed(numbered(30))
        first = harness.make(batch_size=10)
        await first.connect()
        batches = await collect(first, 30)
        await first.acknowledge(batches[0])
        settled = len(batches[0].messages)
        await first.aclose()

        second = harness.make(batch_size=10)
        await second.connect()
        again = await collect(second, 30 - settled)

        assert dedup_keys(messages_of(again)) == dedup_keys(numbered(30)[settled:])
        await second.aclose()

    @shows("at least once")
    async def test_what_was_acknowledged_is_never_handed_out_again(
        self, harness: SourceHarness
    ) -> None:
        await harness.feed(numbered(30))
        first = harness.make(batch_size=10)
        await first.connect()
        for batch in await collect(first, 30):
            await first.acknowledge(batch)
        await first.aclose()

        second = harness.make()
        await second.connect()

        await assert_nothing_more(second)
        await harness.feed(numbered(1, start=30))
        assert dedup_keys(messages_of(await collect(second, 1))) == ["m:30"]
        await second.aclose()

    @shows("at least once")
    async def test_acknowledging_twice_does_no_harm(self, harness: SourceHarness) -> None:
        await harness.feed(numbered(20))
        source = harness.make(batch_size=10)
        await source.connect()
        batches = await collect(source, 20)
        for batch in batches:
            await source.acknowledge(batch)

        for batch in batches:
            await source.acknowledge(batch)

        await source.aclose()
        second = harness.make()
        await second.connect()
        await assert_nothing_more(second)
        await second.aclose()

    @shows("lag")
    async def test_the_lag_is_what_is_not_acknowledged(self, harness: SourceHarness) -> None:
        await harness.feed(numbered(30))
        source = harness.make(batch_size=10)
        await source.connect()
        batches = await collect(source, 30)

        left = 30
        await until_lag(source, left)
        for batch in batches:
            await source.acknowledge(batch)
            left -= len(batch.messages)
            await until_lag(source, left)

        await source.aclose()

    @shows("connect")
    async def test_connecting_again_forgets_the_unacknowledged_batches(
        self, harness: SourceHarness
    ) -> None:
        await harness.feed(numbered(20))
        source = harness.make(batch_size=10)
        await source.connect()
        batches = await collect(source, 20)
        await source.acknowledge(batches[0])
        settled = len(batches[0].messages)

        await source.connect()

        again = await collect(source, 20 - settled)
        assert dedup_keys(messages_of(again)) == dedup_keys(numbered(20)[settled:])
        await source.aclose()

    @shows("connect")
    async def test_polling_before_connecting_is_an_outage(self, harness: SourceHarness) -> None:
        source = harness.make()

        assert not await source.is_healthy()
        with pytest.raises(Outage):
            await source.poll()
        await source.aclose()

    @shows("connect")
    async def test_a_connected_source_is_healthy(self, harness: SourceHarness) -> None:
        source = harness.make()

        await source.connect()

        assert await source.is_healthy()
        await source.aclose()

    @shows("reject")
    async def test_a_rejected_batch_is_handed_out_again_at_once(
        self, harness: SourceHarness
    ) -> None:
        await harness.feed(numbered(10))
        source = harness.make()
        await source.connect()
        batches = await collect(source, 10)

        for batch in batches:
            await source.reject(batch)

        again = await collect(source, 10, timeout_s=AT_ONCE_S)
        assert sorted(dedup_keys(messages_of(again))) == sorted(dedup_keys(numbered(10)))
        await source.aclose()

    @shows("reject")
    async def test_a_rejected_batch_is_handed_out_at_once_to_the_next_source(
        self, harness: SourceHarness
    ) -> None:
        await harness.feed(numbered(10))
        first = harness.make()
        await first.connect()
        for batch in await collect(first, 10):
            await first.reject(batch)
        await first.aclose()

        second = harness.make()
        await second.connect()

        again = await collect(second, 10, timeout_s=AT_ONCE_S)
        assert sorted(dedup_keys(messages_of(again))) == sorted(dedup_keys(numbered(10)))
        await second.aclose()

    @shows("poll")
    async def test_an_empty_poll_returns_soon_and_says_so(self, harness: SourceHarness) -> None:
        source = harness.make()
        await source.connect()
        # One that finds nothing for the first time says so within a second.
        async with asyncio.timeout(IDLE_POLL_S + MARGIN_S):
            first = await source.poll()
        async with asyncio.timeout(harness.idle_poll_s + MARGIN_S):
            second = await source.poll()

        assert not first.messages
        assert not second.messages
        assert second.is_end_of_backlog
        await source.aclose()

    @shows("interrupt")
    async def test_an_interrupted_poll_returns_at_once_and_loses_nothing(
        self, harness: SourceHarness
    ) -> None:
        source = harness.make()
        await source.connect()
        await source.poll()

        for number in range(5):
            polling = asyncio.create_task(source.poll())
            await asyncio.sleep(0)
            started = time.monotonic()
            source.interrupt()
            batch = await polling
            assert time.monotonic() - started < MARGIN_S
            assert not batch.messages
            await harness.feed(numbered(1, start=number))
            assert dedup_keys(messages_of(await collect(source, 1))) == [f"m:{number}"]
        await source.aclose()

    @shows("interrupt")
    async def test_interrupts_while_messages_flow_lose_and_repeat_nothing(
        self, harness: SourceHarness
    ) -> None:
        source = harness.make(batch_size=10)
        source.interrupt()
        await source.connect()
        await harness.feed(numbered(200))
        is_over = asyncio.Event()

        async def disturb() -> None:
            while not is_over.is_set():
                source.interrupt()
                await asyncio.sleep(0.001)

        async with asyncio.timeout(BOUND_S), asyncio.TaskGroup() as tasks:
            tasks.create_task(disturb())
            batches = await collect(source, 200)
            is_over.set()

        assert dedup_keys(messages_of(batches)) == dedup_keys(numbered(200))
        await source.aclose()

    @shows("reconnect")
    async def test_a_lost_connection_costs_no_message(self, harness: SourceHarness) -> None:
        messages = numbered(60)
        await harness.feed(messages[:40])
        source = harness.make(batch_size=10)
        await source.connect()
        acknowledged = await collect(source, 10)
        for batch in acknowledged:
            await source.acknowledge(batch)

        await harness.cut()
        await self._poll_until_the_outage_shows(source)
        assert not await source.is_healthy()
        with pytest.raises(Outage):
            async with asyncio.timeout(BOUND_S):
                await source.connect()
        await harness.restore()
        await reconnect(source.connect)
        await harness.feed(messages[40:])
        settled = len(messages_of(acknowledged))
        later: list[Batch] = []
        await collect_through_outages(source, 60 - settled, later, acknowledge=True)

        arrived = dedup_keys(first_occurrences(messages_of([*acknowledged, *later])))
        if not harness.keeps_order_over_outages:
            arrived = sorted(arrived, key=dedup_keys(messages).index)
        assert arrived == dedup_keys(messages)
        await source.aclose()

    @shows("reconnect")
    async def test_connections_that_break_again_and_again_cost_no_message(
        self, harness: SourceHarness
    ) -> None:
        messages = numbered(200)
        await harness.feed(messages)
        source = harness.make(batch_size=10)
        await source.connect()
        batches: list[Batch] = []

        for count in (20, 80, 140):
            await collect_through_outages(source, count, batches, acknowledge=True)
            await harness.cut()
            await harness.restore()
        await collect_through_outages(source, 200, batches, acknowledge=True)

        assert sorted(set(dedup_keys(messages_of(batches)))) == sorted(dedup_keys(messages))
        await source.aclose()

    @shows("restart")
    async def test_a_restart_of_the_server_costs_no_message(self, harness: SourceHarness) -> None:
        messages = numbered(40)
        await harness.feed(messages)
        source = harness.make(batch_size=10)
        await source.connect()
        acknowledged = await collect(source, 10)
        for batch in acknowledged:
            await source.acknowledge(batch)

        await harness.restart()
        settled = len(messages_of(acknowledged))
        later: list[Batch] = []
        await collect_through_outages(source, 40 - settled, later, acknowledge=True)

        arrived = set(dedup_keys(messages_of([*acknowledged, *later])))
        assert arrived == set(dedup_keys(messages))
        await source.aclose()

    @shows("keep alive")
    async def test_a_batch_that_is_kept_alive_stays_ours(self, harness: SourceHarness) -> None:
        source, lease_s = harness.make_short_lived()
        assert lease_s <= 3.0
        await harness.feed(numbered(5))
        await source.connect()
        batches = await collect(source, 5)
        interval_s = source.keep_alive_interval_s
        assert interval_s is not None
        assert interval_s < lease_s

        # Time is what is tested: the lease must run out, twice, without the batch coming back.
        deadline = time.monotonic() + 2.2 * lease_s
        next_tick = time.monotonic() + interval_s
        while time.monotonic() < deadline:
            batch = await source.poll()
            assert not batch.messages
            if time.monotonic() >= next_tick:
                next_tick += interval_s
                for out in batches:
                    await source.keep_alive(out)
        for batch in batches:
            await source.acknowledge(batch)

        await assert_nothing_more(source)
        await source.aclose()

    @shows("cancellation")
    @pytest.mark.parametrize("turns", [0, 1, 3, 10])
    async def test_a_poll_cut_off_by_a_forced_stop_loses_nothing(
        self, harness: SourceHarness, turns: int
    ) -> None:
        await harness.feed(numbered(20))
        first = harness.make()
        await first.connect()
        polling = asyncio.create_task(first.poll())
        for _ in range(turns):
            await asyncio.sleep(0)
        polling.cancel()
        await asyncio.wait([polling], timeout=BOUND_S)
        await first.aclose()

        second = harness.make()
        await second.connect()

        # A broker that had already handed them to the cancelled poll redelivers after its own time.
        again = await collect(second, 20, timeout_s=60)
        assert sorted(dedup_keys(messages_of(again))) == sorted(dedup_keys(numbered(20)))
        await second.aclose()

    @shows("close")
    async def test_closing_twice_or_without_a_connection_does_no_harm(
        self, harness: SourceHarness
    ) -> None:
        never_connected = harness.make()
        await never_connected.aclose()

        source = harness.make()
        await source.connect()
        await source.aclose()
        await source.aclose()

        assert not await source.is_healthy()

    @shows("close")
    async def test_a_start_and_a_stop_leave_no_task_thread_or_socket(
        self, harness: SourceHarness
    ) -> None:
        async def use(first: int) -> None:
            await harness.feed(numbered(3, start=first))
            source = harness.make()
            await source.connect()
            for batch in await collect(source, 3):
                await source.acknowledge(batch)
            await source.aclose()

        # What the first use of a library leaves, and keeps, is none of the source's.
        await use(0)
        belongings = Belongings()

        for first in (3, 6, 9):
            await use(first)

        await belongings.until_no_more_than_before()

    @pytest.mark.parametrize("how", ["cut", "stall"])
    @shows("reconnect")
    async def test_closing_is_bounded_while_the_broker_is_gone(
        self, harness: SourceHarness, how: str
    ) -> None:
        await harness.feed(numbered(3))
        source = harness.make()
        await source.connect()
        await collect(source, 3)
        await (harness.cut() if how == "cut" else harness.stall())

        async with asyncio.timeout(CLOSED_WITHIN_S):
            await source.aclose()

        await harness.restore()

    @shows("close")
    async def test_a_closed_source_can_be_connected_again(self, harness: SourceHarness) -> None:
        source = harness.make()
        await source.connect()
        await source.aclose()
        await harness.feed(numbered(3))

        await source.connect()

        assert len(messages_of(await collect(source, 3))) == 3
        await source.aclose()

    @shows("tls")
    async def test_a_trusted_server_is_spoken_to_over_tls(self, harness: SourceHarness) -> None:
        source = await harness.make_tls(trusted=True)

        await source.connect()
        await source.poll()

        assert await source.is_healthy()
        await source.aclose()

    @shows("tls")
    async def test_a_server_of_another_authority_is_refused(self, harness: SourceHarness) -> None:
        source = await harness.make_tls(trusted=False)

        with pytest.raises(ConfigurationError):
            async with asyncio.timeout(BOUND_S):
                await source.connect()
        await source.aclose()

    @shows("authentication")
    async def test_refused_credentials_are_said_to_be_refused(self, harness: SourceHarness) -> None:
        source = await harness.make_unauthorized()

        with pytest.raises(AuthenticationRefused):
            async with asyncio.timeout(BOUND_S):
                await source.connect()
        await source.aclose()

    @shows("driver errors")
    def test_every_exception_of_the_driver_becomes_one_of_ours(
        self, harness: SourceHarness
    ) -> None:
        assert_every_exception_is_mapped(harness)

    @shows("round trip")
    async def test_a_message_of_our_own_sink_comes_back_with_every_field(
        self, harness: SourceHarness
    ) -> None:
        sent = complete_message()
        bare = RelayMessage(dedup_key="bare:1", payload=b"{}")
        await harness.feed([sent, bare])
        source = harness.make()
        await source.connect()

        arrived = {message.dedup_key: message for message in messages_of(await collect(source, 2))}

        assert_same_message(arrived[sent.dedup_key], sent, harness.carries)
        assert_same_message(arrived[bare.dedup_key], bare, harness.carries - {"subject"})
        await source.aclose()

    @shows("plain payloads")
    async def test_what_only_looks_like_our_envelope_is_a_payload(
        self, harness: SourceHarness
    ) -> None:
        await harness.feed_bodies([LOOKS_LIKE_AN_ENVELOPE])
        source = harness.make()
        await source.connect()

        (message,) = messages_of(await collect(source, 1))

        assert message.payload.strip() == LOOKS_LIKE_AN_ENVELOPE
        assert message.op == "event"
        await source.aclose()

    @shows("plain payloads")
    async def test_equal_plain_payloads_are_different_messages(
        self, harness: SourceHarness
    ) -> None:
        await harness.feed_bodies([b'{"a":1}'] * 10)
        source = harness.make()
        await source.connect()

        arrived = messages_of(await collect(source, 10))

        assert [message.payload for message in arrived] == [b'{"a":1}'] * 10
        assert len(set(dedup_keys(arrived))) == 10
        await source.aclose()

    @shows("stable keys of plain payloads")
    async def test_a_plain_payload_that_is_handed_out_again_has_the_same_dedup_key(
        self, harness: SourceHarness
    ) -> None:
        await harness.feed_bodies([b'{"a":%d}' % number for number in range(10)])
        first = harness.make()
        await first.connect()
        batches = await collect(first, 10)
        for batch in batches:
            await first.reject(batch)
        await first.aclose()

        second = harness.make()
        await second.connect()
        again = await collect(second, 10, timeout_s=AT_ONCE_S)

        keys = {message.payload: message.dedup_key for message in messages_of(batches)}
        assert {message.payload: message.dedup_key for message in messages_of(again)} == keys
        await second.aclose()

    @shows("bad input")
    async def test_bad_input_passes_or_is_refused_and_costs_only_itself(
        self, harness: SourceHarness
    ) -> None:
        fed: list[bytes] = []
        for number, body in enumerate(BAD_BODIES.values()):
            fed += await harness.feed_bodies([b'{"good":%d}' % number, body])
        source = harness.make()
        await source.connect()

        batches = await collect(source, len(fed))

        good = [body for body in fed if body.startswith(b'{"good"')]
        arrived = [message.payload for message in messages_of(batches)]
        refused = [rejected for batch in batches for rejected in batch.rejected]
        assert [payload for payload in arrived if payload.startswith(b'{"good"')] == good
        assert sorted([*arrived, *(rejected.message.payload for rejected in refused)]) == sorted(
            fed
        )
        assert all(isinstance(rejected.error, MessageRejected) for rejected in refused)
        for batch in batches:
            await source.acknowledge(batch)
        await assert_nothing_more(source)
        await source.aclose()

    async def _poll_until_the_outage_shows(self, source: Source) -> None:
        async with asyncio.timeout(BOUND_S):
            while True:
                try:
                    await source.poll()
                except Outage:
                    return
