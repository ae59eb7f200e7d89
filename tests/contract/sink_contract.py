"""The contract of sinks as tests; every backend's sink passes them against its real broker.

A backend subclasses `SinkContract` as `Test<Name>Sink`, sets ``backend`` and ``lacks``, and
supplies a fixture ``harness`` that yields a `SinkHarness` over a broker of the test's own
(a fresh stream, topic, file), which it removes again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import pytest
from msgspec import structs

from relay.contracts import Sink
from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    ErrorKind,
    MessageRejected,
    MessageTooLarge,
    Outage,
)
from relay.message import RelayMessage
from tests.contract.evidence import (
    BOUND_S,
    CLOSED_WITHIN_S,
    PAUSE_S,
    SERIALIZED_FIELDS,
    Belongings,
    Contract,
    DriverErrors,
    assert_every_exception_is_mapped,
    assert_per_key_order,
    assert_same_message,
    complete_message,
    dedup_keys,
    lacking,
    numbered,
    reconnect,
    shows,
    with_bad_content,
)


class SinkHarness(DriverErrors, Protocol):
    """One sink's broker and how to disturb it.

    What belongs to a lacking evidence is never called; a harness that subclasses this protocol
    inherits bodies that say so.
    """

    @property
    def carries(self) -> frozenset[str]:
        """The fields of a message that reach a consumer unchanged."""
        return SERIALIZED_FIELDS

    def make(self) -> Sink:
        """A sink to this test's broker, not connected, with the backend's default options."""
        ...

    def make_strict(self) -> Sink:
        """The same in the mode in which retries keep per-key order."""
        return self.make()

    async def received(self, at_least: int) -> Sequence[RelayMessage]:
        """All that the broker holds, in its order and with repeats, read past the sink.

        Waits until that are ``at_least`` different dedup keys (`tests.contract.evidence.until`
        helps). ``subject`` is the one the message was sent to, the rest restored as a consumer
        of ours would.
        """
        ...

    def unacceptable(self, dedup_key: str) -> RelayMessage:
        """A message that the sink or its broker refuses for good."""
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

    def oversize(self, dedup_key: str) -> RelayMessage:  # noqa: ARG002 - for the harnesses
        """A message just above the broker's limit (evidence ``oversize``)."""
        raise lacking("oversize")

    async def make_tls(self, *, trusted: bool) -> Sink:  # noqa: ARG002 - for the harnesses
        """A sink to a TLS server whose authority it trusts, or not (evidence ``tls``)."""
        raise lacking("tls")

    async def make_unauthorized(self) -> Sink:
        """A sink with credentials that the server refuses (evidence ``authentication``)."""
        raise lacking("authentication")


async def deliver(sink: Sink, messages: Sequence[RelayMessage]) -> None:
    """Publish as the loop does: reconnect after an outage, repeat only what failed, in order.

    Raises TimeoutError after `BOUND_S`; fails where a message is refused for good.
    """
    pending = list(messages)
    async with asyncio.timeout(BOUND_S):
        while True:
            try:
                failures = (await sink.publish(pending)).failures
            except Outage:
                await reconnect(sink.connect)
                continue
            refused = [failure for failure in failures if failure.error.kind is ErrorKind.MESSAGE]
            assert not refused
            pending = [pending[failure.index] for failure in failures]
            if not pending:
                return
            await asyncio.sleep(PAUSE_S)


class SinkContract(Contract):
    """What every sink keeps."""

    direction = "forward"
    can_be_lacking = frozenset(
        {
            "deduplication",
            "order under failure",
            "reconnect",
            "restart",
            "oversize",
            "tls",
            "authentication",
            "round trip",
        }
    )

    @shows("order")
    async def test_messages_arrive_in_the_order_published(self, harness: SinkHarness) -> None:
        sink = harness.make()
        await sink.connect()
        messages = numbered(600)

        for start in range(0, 600, 200):
            result = await sink.publish(messages[start : start + 200])
            assert not result.failures

        assert dedup_keys(await harness.received(600)) == dedup_keys(messages)
        await sink.aclose()

    @shows("order")
    async def test_publishing_nothing_is_accepted(self, harness: SinkHarness) -> None:
        sink = harness.make()
        await sink.connect()

        result = await sink.publish([])

        assert not result.failures
        await sink.aclose()

    @shows("order under failure")
    async def test_messages_of_one_key_keep_their_order_while_the_connection_breaks(
        self, harness: SinkHarness
    ) -> None:
        sink = harness.make_strict()
        await sink.connect()
        messages = numbered(600, keys=7)

        async def publish_all() -> None:
            for start in range(0, 600, 50):
                await deliver(sink, messages[start : start + 50])

        async with asyncio.timeout(BOUND_S), asyncio.TaskGroup() as tasks:
            tasks.create_task(publish_all())
            for arrived in (30, 200, 400):
                await harness.received(arrived)
                await harness.cut()
                await harness.restore()

        assert_per_key_order(await harness.received(600), messages)
        await sink.aclose()

    @shows("at least once")
    async def test_what_is_accepted_is_held_by_the_broker(self, harness: SinkHarness) -> None:
        sink = harness.make()
        await sink.connect()
        messages = numbered(50)
        await deliver(sink, messages)
        await sink.aclose()

        assert dedup_keys(await harness.received(50)) == dedup_keys(messages)

    @shows("at least once")
    async def test_a_repeated_publish_is_accepted_and_carries_the_same_keys(
        self, harness: SinkHarness
    ) -> None:
        sink = harness.make()
        await sink.connect()
        messages = numbered(20)
        await deliver(sink, messages)

        await deliver(sink, messages)

        assert set(dedup_keys(await harness.received(20))) == set(dedup_keys(messages))
        await sink.aclose()

    @shows("deduplication")
    async def test_the_broker_holds_a_repeated_message_once_and_the_repeat_is_counted(
        self, harness: SinkHarness
    ) -> None:
        sink = harness.make()
        await sink.connect()
        messages = numbered(20)
        await deliver(sink, messages[:10])

        result = await sink.publish(messages)

        assert not result.failures
        assert result.duplicates == 10
        assert dedup_keys(await harness.received(20)) == dedup_keys(messages)
        await sink.aclose()

    @shows("partial failure")
    async def test_one_refused_message_does_not_fail_its_neighbours(
        self, harness: SinkHarness
    ) -> None:
        sink = harness.make()
        await sink.connect()
        good = numbered(10)
        published = [*good[:5], harness.unacceptable("bad"), *good[5:]]

        result = await sink.publish(published)

        assert [failure.index for failure in result.failures] == [5]
        assert result.failures[0].error.kind is ErrorKind.MESSAGE
        assert dedup_keys(await harness.received(10)) == dedup_keys(good)
        await sink.aclose()

    @shows("partial failure")
    async def test_a_batch_of_refused_messages_names_each_of_them(
        self, harness: SinkHarness
    ) -> None:
        sink = harness.make()
        await sink.connect()

        result = await sink.publish([harness.unacceptable("bad:1"), harness.unacceptable("bad:2")])

        assert [failure.index for failure in result.failures] == [0, 1]
        await deliver(sink, numbered(1))
        assert dedup_keys(await harness.received(1)) == ["m:0"]
        await sink.aclose()

    @shows("reconnect")
    async def test_a_lost_connection_is_an_outage_and_the_next_connect_heals_it(
        self, harness: SinkHarness
    ) -> None:
        sink = harness.make()
        await sink.connect()
        messages = numbered(40)
        await deliver(sink, messages[:20])

        await harness.cut()
        await self._publish_in_vain(sink, messages[20:])
        assert not await sink.is_healthy()
        with pytest.raises(Outage):
            async with asyncio.timeout(BOUND_S):
                await sink.connect()
        await harness.restore()
        await reconnect(sink.connect)
        await deliver(sink, messages[20:])

        assert await sink.is_healthy()
        assert_per_key_order(await harness.received(40), messages)
        await sink.aclose()

    @shows("restart")
    async def test_a_restart_of_the_server_costs_no_message(self, harness: SinkHarness) -> None:
        sink = harness.make()
        await sink.connect()
        messages = numbered(40)
        await deliver(sink, messages[:20])

        await harness.restart()
        await deliver(sink, messages[20:])

        assert_per_key_order(await harness.received(40), messages)
        await sink.aclose()

    @shows("cancellation")
    @pytest.mark.parametrize("turns", [0, 1, 2, 5, 20])
    async def test_a_cancelled_publish_can_be_repeated_with_the_same_keys(
        self, harness: SinkHarness, turns: int
    ) -> None:
        sink = harness.make_strict()
        await sink.connect()
        messages = numbered(100, keys=3)
        publishing = asyncio.create_task(deliver(sink, messages))
        for _ in range(turns):
            await asyncio.sleep(0)

        publishing.cancel()
        await asyncio.wait([publishing], timeout=BOUND_S)
        assert publishing.done()
        await deliver(sink, messages)

        assert_per_key_order(await harness.received(100), messages)
        await sink.aclose()

    @shows("close")
    async def test_closing_twice_or_without_a_connection_does_no_harm(
        self, harness: SinkHarness
    ) -> None:
        never_connected = harness.make()
        await never_connected.aclose()

        sink = harness.make()
        await sink.connect()
        await sink.aclose()
        await sink.aclose()

        assert not await sink.is_healthy()

    @shows("close")
    async def test_a_start_and_a_stop_leave_no_task_thread_or_socket(
        self, harness: SinkHarness
    ) -> None:
        async def use(first: int) -> None:
            sink = harness.make()
            await sink.connect()
            await deliver(sink, numbered(3, start=first))
            await sink.aclose()

        # What the first use of a library leaves, and keeps, is none of the sink's.
        await use(0)
        belongings = Belongings()

        for first in (3, 6, 9):
            await use(first)

        await belongings.until_no_more_than_before()

    @pytest.mark.parametrize("how", ["cut", "stall"])
    @shows("reconnect")
    async def test_closing_is_bounded_while_the_broker_is_gone(
        self, harness: SinkHarness, how: str
    ) -> None:
        sink = harness.make()
        await sink.connect()
        await deliver(sink, numbered(3))
        await (harness.cut() if how == "cut" else harness.stall())

        async with asyncio.timeout(CLOSED_WITHIN_S):
            await sink.aclose()

        await harness.restore()

    @shows("close")
    async def test_a_closed_sink_can_be_connected_again(self, harness: SinkHarness) -> None:
        sink = harness.make()
        await sink.connect()
        await sink.aclose()

        await sink.connect()
        await deliver(sink, numbered(3))

        assert len(await harness.received(3)) == 3
        await sink.aclose()

    @shows("connect")
    async def test_connecting_twice_starts_over(self, harness: SinkHarness) -> None:
        sink = harness.make()
        await sink.connect()
        await deliver(sink, numbered(3))

        await sink.connect()
        await deliver(sink, numbered(3, start=3))

        assert await sink.is_healthy()
        assert dedup_keys(await harness.received(6)) == dedup_keys(numbered(6))
        await sink.aclose()

    @shows("connect")
    async def test_publishing_before_connecting_is_an_outage(self, harness: SinkHarness) -> None:
        sink = harness.make()

        assert not await sink.is_healthy()
        with pytest.raises(Outage):
            await sink.publish(numbered(1))
        await sink.aclose()

    @shows("oversize")
    async def test_an_oversize_message_is_refused_before_sending_and_the_limit_named(
        self, harness: SinkHarness
    ) -> None:
        sink = harness.make()
        await sink.connect()
        good = numbered(2)

        result = await sink.publish([good[0], harness.oversize("big"), good[1]])

        assert [failure.index for failure in result.failures] == [1]
        error = result.failures[0].error
        assert isinstance(error, MessageTooLarge)
        assert any(character.isdigit() for character in str(error)), str(error)
        assert dedup_keys(await harness.received(2)) == dedup_keys(good)
        await sink.aclose()

    @shows("tls")
    async def test_a_trusted_server_is_spoken_to_over_tls(self, harness: SinkHarness) -> None:
        sink = await harness.make_tls(trusted=True)

        await sink.connect()
        await deliver(sink, numbered(3))

        assert await sink.is_healthy()
        await sink.aclose()

    @shows("tls")
    async def test_a_server_of_another_authority_is_refused(self, harness: SinkHarness) -> None:
        sink = await harness.make_tls(trusted=False)

        with pytest.raises(ConfigurationError):
            async with asyncio.timeout(BOUND_S):
                await sink.connect()
        await sink.aclose()

    @shows("authentication")
    async def test_refused_credentials_are_said_to_be_refused(self, harness: SinkHarness) -> None:
        sink = await harness.make_unauthorized()

        with pytest.raises(AuthenticationRefused):
            async with asyncio.timeout(BOUND_S):
                await sink.connect()
        await sink.aclose()

    @shows("driver errors")
    def test_every_exception_of_the_driver_becomes_one_of_ours(self, harness: SinkHarness) -> None:
        assert_every_exception_is_mapped(harness)

    @shows("round trip")
    async def test_a_consumer_gets_back_every_field_that_was_sent(
        self, harness: SinkHarness
    ) -> None:
        sink = harness.make()
        await sink.connect()
        sent = complete_message()
        bare = RelayMessage(dedup_key="bare:1", payload=b"{}")
        bare = structs.replace(bare, subject=sink.subject_of(bare))

        await deliver(sink, [sent, bare])

        arrived = {message.dedup_key: message for message in await harness.received(2)}
        assert_same_message(arrived[sent.dedup_key], sent, harness.carries)
        assert_same_message(arrived[bare.dedup_key], bare, harness.carries - {"subject"})
        await sink.aclose()

    @shows("bad input")
    async def test_bad_input_passes_or_is_refused_and_costs_only_itself(
        self, harness: SinkHarness
    ) -> None:
        sink = harness.make()
        await sink.connect()
        bad = with_bad_content()
        published: list[RelayMessage] = []
        for number, message in enumerate(bad):
            published += [*numbered(1, start=number, prefix="good"), message]

        result = await sink.publish(published)

        refused = {failure.index for failure in result.failures}
        assert all(isinstance(failure.error, MessageRejected) for failure in result.failures)
        assert all(published[index] in bad for index in refused)
        accepted = [
            message.dedup_key
            for index, message in enumerate(published)
            if index not in refused and message.dedup_key.startswith("good")
        ]
        arrived = dedup_keys(await harness.received(len(published) - len(refused)))
        assert [key for key in arrived if key.startswith("good")] == accepted
        await sink.aclose()

    async def _publish_in_vain(self, sink: Sink, messages: Sequence[RelayMessage]) -> None:
        """Publish while the broker is away: an outage, or every message a transient failure."""
        async with asyncio.timeout(BOUND_S):
            try:
                result = await sink.publish(messages)
            except Outage:
                return
        assert len(result.failures) == len(messages)
        assert all(failure.error.kind is ErrorKind.OUTAGE for failure in result.failures)
