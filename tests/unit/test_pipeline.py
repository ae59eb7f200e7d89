"""One pipeline from its start to its end, in memory: sessions, stopping, draining, prefetch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import pytest

from relay.contracts import ALL_ACCEPTED, Batch, PublishResult
from relay.delivery import RetryPolicy
from relay.errors import ConfigurationError, DestinationMissing, LeaseLost, Outage, PositionLost
from relay.events import (
    BatchAcknowledged,
    BatchPublished,
    ConnectionChanged,
    LeaseExpired,
    PipelineState,
    Polled,
    Retried,
    SourceLagObserved,
    StateChanged,
)
from relay.message import RelayMessage
from relay.pipeline import Ending
from tests.servers.memory import MemoryChannel, MemorySink, MemorySource
from tests.unit.in_memory import BOUND_S, Line, message


class Measured(MemorySource):
    """Tells its lag when the test lets it."""

    def __init__(self, channel: MemoryChannel) -> None:
        super().__init__(channel)
        self.answers: asyncio.Queue[int | Exception] = asyncio.Queue()
        self.asked = asyncio.Event()
        self.was_cancelled = False

    async def lag(self) -> int | None:
        self.asked.set()
        try:
            answer = await self.answers.get()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        if isinstance(answer, Exception):
            raise answer
        return answer


class Watched(MemorySource):
    """Counts what the loop asks of it; fails where a test tells it to."""

    def __init__(self, channel: MemoryChannel, *, batch_size: int = 1) -> None:
        super().__init__(channel, batch_size=batch_size)
        self.polled = 0
        self.settled = 0
        self.kept_alive = asyncio.Event()
        self.closed = 0
        self.poll_errors: list[Exception] = []
        self.acknowledge_errors: list[Exception] = []
        self.connect_errors: list[Exception] = []

    @property
    def keep_alive_interval_s(self) -> float | None:
        return 0.001

    async def connect(self) -> None:
        if self.connect_errors:
            raise self.connect_errors.pop(0)
        await super().connect()

    async def poll(self) -> Batch:
        if self.poll_errors:
            raise self.poll_errors.pop(0)
        batch = await super().poll()
        self.polled += len(batch.messages)
        return batch

    async def acknowledge(self, batch: Batch) -> None:
        if self.acknowledge_errors:
            raise self.acknowledge_errors.pop(0)
        await super().acknowledge(batch)
        self.settled += len(batch.messages)

    async def keep_alive(self, batch: Batch) -> None:
        await super().keep_alive(batch)
        self.kept_alive.set()

    async def aclose(self) -> None:
        self.closed += 1
        await super().aclose()


def _watched(line: Line) -> Watched:
    assert isinstance(line.source, Watched)
    return line.source


async def test_all_that_was_written_arrives_in_order_and_the_end_of_input_completes_it() -> None:
    line = Line(batch_size=7)
    keys = [str(n) for n in range(100)]
    line.write(*(message(key) for key in keys))

    assert await line.run_to_the_end() is Ending.COMPLETED

    assert line.received == keys
    assert line.acknowledged == 100
    assert line.heard.states == [
        PipelineState.STARTING,
        PipelineState.RUNNING,
        PipelineState.COMPLETED,
    ]


async def test_source_and_sink_are_told_connected_and_then_lost() -> None:
    line = Line()

    await line.run_to_the_end()

    told = [(event.side, event.is_connected) for event in line.heard.of(ConnectionChanged)]
    assert told == [("source", True), ("sink", True), ("source", False), ("sink", False)]


async def test_each_batch_is_polled_published_and_acknowledged_in_this_order() -> None:
    line = Line()
    line.write(message("0"))

    await line.run_to_the_end()

    steps = [
        type(e) for e in line.heard.events if not isinstance(e, StateChanged | ConnectionChanged)
    ]
    assert steps == [Polled, BatchPublished, BatchAcknowledged]


async def test_a_batch_is_never_acknowledged_before_the_sink_has_accepted_it() -> None:
    line = Line(source=Watched)
    line.write(message("0"))
    line.faults.accepting.clear()

    async with line.running():
        await line.heard.until(lambda: bool(line.heard.of(Polled)))
        await asyncio.wait_for(_watched(line).kept_alive.wait(), BOUND_S)
        assert _watched(line).settled == 0
        line.faults.accepting.set()
        await line.heard.until(lambda: line.acknowledged == 1)


async def test_a_batch_that_is_unacknowledged_for_long_is_kept_alive() -> None:
    line = Line(source=Watched)
    line.write(message("0"))
    line.faults.accepting.clear()

    async with line.running():
        for _ in range(3):
            await asyncio.wait_for(_watched(line).kept_alive.wait(), BOUND_S)
            _watched(line).kept_alive.clear()
        line.faults.accepting.set()


@pytest.mark.parametrize("prefetch", [0, 1, 3])
async def test_no_more_is_polled_ahead_than_the_prefetch_allows(prefetch: int) -> None:
    line = Line(source=Watched, prefetch=prefetch)
    line.write(*(message(str(n)) for n in range(10)))
    line.faults.accepting.clear()

    async with line.running():
        await line.heard.until(lambda: len(line.heard.of(Polled)) == prefetch + 1)
        for _ in range(3):
            _watched(line).kept_alive.clear()
            await asyncio.wait_for(_watched(line).kept_alive.wait(), BOUND_S)
        assert _watched(line).polled == prefetch + 1
        line.faults.accepting.set()
        await line.heard.until(lambda: line.acknowledged == 10)


async def test_a_stop_lets_the_publish_in_hand_finish_and_gives_the_rest_back() -> None:
    line = Line(source=Watched, prefetch=2)
    line.write(*(message(str(n)) for n in range(5)))
    line.faults.accepting.clear()

    async with line.running() as run:
        await line.heard.until(lambda: len(line.heard.of(Polled)) == 3)
        line.pipeline.stop()
        line.faults.accepting.set()
        await asyncio.wait_for(run, BOUND_S)

    assert run.result() is Ending.STOPPED
    assert line.received == ["0"]
    assert line.acknowledged == 1
    assert line.here.take(10) == [1, 2, 3, 4]


async def test_a_stop_while_idle_ends_at_once() -> None:
    line = Line()

    async with line.running() as run:
        await line.heard.until(lambda: PipelineState.RUNNING in line.heard.states)
        line.pipeline.stop()
        async with asyncio.timeout(0.5):
            await asyncio.wait([run])

    assert line.heard.states[-2:] == [PipelineState.STOPPING, PipelineState.STOPPED]


async def test_while_it_stops_a_pipeline_tells_only_how_it_ends() -> None:
    line = Line(source=Watched)
    line.write(message("0"))
    line.faults.accepting.clear()

    async with line.running() as run:
        await line.heard.until(lambda: bool(line.heard.of(Polled)))
        await asyncio.wait_for(_watched(line).kept_alive.wait(), BOUND_S)
        line.pipeline.stop()
        line.faults.accepting.set()
        await asyncio.wait_for(run, BOUND_S)
    line.pipeline.stop()

    assert line.acknowledged == 1
    assert line.heard.states[-2:] == [PipelineState.STOPPING, PipelineState.STOPPED]


async def test_a_stop_while_the_sink_can_not_be_reached_ends_at_once() -> None:
    line = Line(policy=RetryPolicy(initial_s=60, max_s=60))
    line.there.cut()

    async with line.running() as run:
        await line.heard.until(lambda: bool(line.heard.of(Retried)))

    assert run.result() is Ending.STOPPED


async def test_a_drain_delivers_what_is_there_and_completes() -> None:
    line = Line(batch_size=3)
    line.write(*(message(str(n)) for n in range(8)))

    line.pipeline.drain()

    assert await line.run() is Ending.COMPLETED
    assert len(line.received) == 8
    assert line.acknowledged == 8


async def test_a_drain_of_a_pipeline_that_can_not_run_fails_instead_of_waiting() -> None:
    line = Line(source=Watched)
    _watched(line).connect_errors = [ConfigurationError("no such outbox")]

    line.pipeline.drain()

    assert await line.run() is Ending.FAILED
    assert line.heard.states[-1] is PipelineState.FAILED


async def test_an_outage_of_the_source_voids_the_session_and_loses_nothing() -> None:
    line = Line(prefetch=2, batch_size=1)
    line.write(*(message(str(n)) for n in range(5)))
    line.faults.accepting.clear()

    async with line.running():
        await line.heard.until(lambda: len(line.heard.of(Polled)) == 3)
        line.here.restart()
        line.faults.accepting.set()
        await line.heard.until(lambda: line.acknowledged >= 5)

    assert list(dict.fromkeys(line.received)) == ["0", "1", "2", "3", "4"]
    assert any(event.side == "source" for event in line.heard.of(Retried))


@pytest.mark.parametrize("error", [Outage("no answer"), LeaseLost("lease 7 ran out")])
async def test_an_acknowledgement_that_fails_repeats_the_batch(error: Exception) -> None:
    line = Line(source=Watched)
    line.write(message("0"))
    _watched(line).acknowledge_errors = [error]

    await line.run_to_the_end()

    assert line.received == ["0", "0"]
    assert line.acknowledged == 1


async def test_a_source_that_is_away_at_first_is_connected_in_the_end() -> None:
    line = Line(source=Watched)
    line.write(message("0"))
    _watched(line).connect_errors = [Outage("refused"), Outage("refused")]

    assert await line.run_to_the_end() is Ending.COMPLETED

    assert [event.attempt for event in line.heard.of(Retried)] == [1, 2]
    assert line.received == ["0"]


async def test_a_failed_pipeline_is_tried_again_after_its_time() -> None:
    line = Line(source=Watched, failed_retry_s=0.001)
    line.write(message("0"))
    _watched(line).connect_errors = [ConfigurationError("no such stream", remedy="make it")]

    assert await line.run_to_the_end() is Ending.COMPLETED

    assert line.heard.states[:3] == [
        PipelineState.STARTING,
        PipelineState.FAILED,
        PipelineState.RUNNING,
    ]
    assert line.heard.of(StateChanged)[1].reason == "no such stream (make it)"


@pytest.mark.parametrize("kind", [DestinationMissing, PositionLost])
async def test_what_was_missing_and_is_made_again_is_found_within_seconds(
    kind: type[ConfigurationError],
) -> None:
    line = Line(source=Watched, failed_retry_s=3600)
    line.write(message("0"))
    _watched(line).connect_errors = [kind("it is gone")]

    async with asyncio.timeout(5):
        assert await line.run_to_the_end() is Ending.COMPLETED

    assert line.received == ["0"]


async def test_a_failed_pipeline_stops_at_once_when_asked() -> None:
    line = Line(source=Watched, failed_retry_s=3600)
    _watched(line).connect_errors = [ConfigurationError("no such stream")]

    async with line.running() as run:
        await line.heard.until(lambda: PipelineState.FAILED in line.heard.states)

    assert run.result() is Ending.STOPPED


async def test_a_bug_fails_its_own_pipeline_and_no_sibling() -> None:
    def transform(one: RelayMessage) -> RelayMessage:
        raise ZeroDivisionError(f"in {one.dedup_key}")

    broken, sound = Line(transform=transform), Line()
    broken.write(message("0"))
    sound.write(message("0"))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(broken.pipeline.run())
        tasks.create_task(sound.pipeline.run())
        await broken.heard.until(lambda: PipelineState.FAILED in broken.heard.states)
        sound.write(message("1"))
        await sound.heard.until(lambda: sound.acknowledged == 2)
        broken.pipeline.stop()
        sound.pipeline.stop()

    reason = next(e.reason for e in broken.heard.of(StateChanged) if e.reason)
    assert reason == "unexpected ZeroDivisionError, see the log"
    assert broken.acknowledged == 0
    assert sound.heard.states[-1] is PipelineState.STOPPED


async def test_a_cancelled_pipeline_ends_and_closes_its_source() -> None:
    line = Line(source=Watched)
    line.write(message("0"))
    line.faults.accepting.clear()
    run = asyncio.create_task(line.pipeline.run())
    await line.heard.until(lambda: bool(line.heard.of(Polled)))

    run.cancel()
    async with asyncio.timeout(BOUND_S):
        await asyncio.wait([run])

    assert run.cancelled()
    assert _watched(line).closed == 1
    assert line.acknowledged == 0


class NeverClosed(Watched):
    """A broker that does not answer the last word."""

    def __init__(self, channel: MemoryChannel) -> None:
        super().__init__(channel)
        self.closing = asyncio.Event()

    async def aclose(self) -> None:
        self.closing.set()
        await asyncio.Event().wait()


async def test_a_pipeline_that_is_cancelled_while_its_source_closes_closes_its_sink() -> None:
    sink = MemorySink(MemoryChannel())
    line = Line(source=NeverClosed, sink=sink)
    run = asyncio.create_task(line.pipeline.run())
    await line.heard.until(lambda: PipelineState.RUNNING in line.heard.states)
    assert await sink.is_healthy()
    source = line.source
    assert isinstance(source, NeverClosed)

    line.pipeline.stop()
    await asyncio.wait_for(source.closing.wait(), BOUND_S)
    run.cancel()
    await asyncio.wait([run], timeout=BOUND_S)

    assert run.cancelled()
    assert not await sink.is_healthy()


class FailsWhenCancelled(Watched):
    """A driver whose connection breaks by the very cancellation of a read."""

    async def poll(self) -> Batch:
        try:
            return await super().poll()
        except asyncio.CancelledError:
            raise Outage("the connection broke") from None


async def test_a_pipeline_is_cancelled_even_if_its_source_fails_at_that_moment() -> None:
    line = Line(source=FailsWhenCancelled)
    run = asyncio.create_task(line.pipeline.run())
    await line.heard.until(lambda: PipelineState.RUNNING in line.heard.states)

    run.cancel()
    await asyncio.wait([run], timeout=1.0)
    has_ended = run.done()
    line.pipeline.stop()
    await asyncio.wait([run], timeout=BOUND_S)

    assert has_ended


class SinkFailsWhenCancelled(MemorySink):
    """A driver whose clean-up fails while it is cancelled."""

    def __init__(self) -> None:
        super().__init__(MemoryChannel())
        self.reached = asyncio.Event()

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        self.reached.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise Outage("no answer") from None
        return await super().publish(messages)


async def test_a_pipeline_is_cancelled_even_if_its_sink_fails_at_that_moment() -> None:
    sink = SinkFailsWhenCancelled()
    line = Line(sink=sink)
    line.write(message("0"))
    run = asyncio.create_task(line.pipeline.run())
    await asyncio.wait_for(sink.reached.wait(), BOUND_S)

    run.cancel()
    await asyncio.wait([run], timeout=BOUND_S)

    assert run.cancelled()


class SinkDropsCancellation(SinkFailsWhenCancelled):
    """A driver that answers as if it had not been cancelled."""

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        with contextlib.suppress(Outage):
            await super().publish(messages)
        return ALL_ACCEPTED


async def test_a_pipeline_is_cancelled_even_if_its_sink_drops_the_cancellation() -> None:
    sink = SinkDropsCancellation()
    line = Line(sink=sink)
    line.write(message("0"))
    run = asyncio.create_task(line.pipeline.run())
    await asyncio.wait_for(sink.reached.wait(), BOUND_S)

    run.cancel()
    await asyncio.wait([run], timeout=BOUND_S)

    assert run.cancelled()
    assert line.acknowledged == 0


async def test_nothing_is_polled_after_a_stop() -> None:
    line = Line(source=Watched, prefetch=0)
    line.write(message("0"), message("1"))
    line.faults.accepting.clear()

    async with line.running() as run:
        await line.heard.until(lambda: bool(line.heard.of(Polled)))
        await asyncio.wait_for(_watched(line).kept_alive.wait(), BOUND_S)
        line.pipeline.stop()
        line.faults.accepting.set()
        await asyncio.wait_for(run, BOUND_S)

    assert len(line.heard.of(Polled)) == 1


async def test_a_pipeline_can_be_run_again_by_another_with_what_it_left() -> None:
    first = Line(batch_size=2)
    first.write(*(message(str(n)) for n in range(6)))
    async with first.running():
        await first.heard.until(lambda: first.acknowledged >= 2)
    second = Line(source=lambda _: MemorySource(first.here))
    first.here.complete()

    await second.run()

    assert first.received + second.received == [str(n) for n in range(6)]


async def test_a_lost_lease_is_no_failure() -> None:
    line = Line(source=Watched)
    _watched(line).acknowledge_errors.append(LeaseLost("the lease is another's"))
    line.write(message("0"))

    assert await line.run_to_the_end() is Ending.COMPLETED

    assert len(line.heard.of(LeaseExpired)) == 1
    assert line.heard.of(Retried) == []
    assert set(line.heard.states) == {
        PipelineState.STARTING,
        PipelineState.RUNNING,
        PipelineState.COMPLETED,
    }


class _Outlasted(Watched):
    """Its lease runs out while a batch waits to be published."""

    interval_s = 60.0

    @property
    def keep_alive_interval_s(self) -> float | None:
        return self.interval_s

    async def poll(self) -> Batch:
        batch = await super().poll()
        if self.polled == 1:
            self.interval_s = 0.0
        return batch

    async def keep_alive(self, batch: Batch) -> None:  # noqa: ARG002 - the contract's signature
        self.interval_s = 60.0
        raise LeaseLost("the lease is another's")


async def test_a_batch_that_waited_too_long_is_not_published_before_it_is_known_to_be_ours() -> (
    None
):
    line = Line(source=_Outlasted)
    line.write(message("0"))

    await line.run_to_the_end()

    assert line.received == ["0"]
    assert len(line.heard.of(LeaseExpired)) == 1


async def test_a_stop_waits_for_the_answer_to_how_much_there_is() -> None:
    line = Line(source=Measured)
    source = line.source
    assert isinstance(source, Measured)

    async with line.running() as task:
        await source.asked.wait()
        line.pipeline.stop()
        await line.heard.until(lambda: bool(line.heard.of(Polled)))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not task.done()
        source.answers.put_nowait(7)

    assert task.result() is Ending.STOPPED
    assert not source.was_cancelled
    assert [one.messages for one in line.heard.of(SourceLagObserved)] == [7]


@pytest.mark.parametrize("error", [Outage("away"), ValueError("a bug")])
async def test_a_lag_that_can_not_be_told_disturbs_no_delivery(error: Exception) -> None:
    line = Line(source=Measured)
    source = line.source
    assert isinstance(source, Measured)
    source.answers.put_nowait(error)

    async with line.running():
        await source.asked.wait()
        line.write(message("a"))
        await line.heard.until(lambda: line.acknowledged == 1)

    assert line.received == ["a"]
    assert line.heard.states == [
        PipelineState.STARTING,
        PipelineState.RUNNING,
        PipelineState.STOPPING,
        PipelineState.STOPPED,
    ]
