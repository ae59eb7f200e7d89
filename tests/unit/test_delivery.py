"""What happens to a batch when its sink fails: in memory, through a whole pipeline."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import datetime

import msgspec
import pytest

from relay.backoff import LONGEST_ASKED_WAIT_S
from relay.catalog import StoredDeadLetter
from relay.contracts import ALL_ACCEPTED, Failure, PublishResult
from relay.delivery import RetryPolicy
from relay.errors import (
    ConfigurationError,
    ErrorKind,
    MessageRejected,
    MessageUndecodable,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from relay.events import (
    BatchPublished,
    ConnectionChanged,
    DeadLettered,
    DeadLettersRetried,
    PipelineState,
    Retried,
    StateChanged,
)
from relay.message import RelayMessage
from relay.pipeline import Ending
from tests.servers.memory import MemoryChannel, MemorySink
from tests.unit.in_memory import BOUND_S, KeptLetters, Line, message

POISON = MessageRejected("not for this sink")


class ScriptedSink:
    """Answers its first publishes as it is told, then accepts; notes what is asked of it, and when.

    A connection that it lost is of no use until `connect`.
    """

    def __init__(self, *answers: Sequence[RelayError | None] | Outage) -> None:
        self.answers = deque(answers)
        self.published: list[list[str]] = []
        self.times_s: list[float] = []
        self.connects = 0
        self._is_open = False

    async def connect(self) -> None:
        self.connects += 1
        self._is_open = True

    def subject_of(self, message: RelayMessage) -> str:
        return message.subject

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        if not self._is_open:
            raise NotConnected("the connection was lost")
        self.times_s.append(time.monotonic())
        self.published.append([message.dedup_key for message in messages])
        answer = self.answers.popleft() if self.answers else ()
        if isinstance(answer, Outage):
            raise answer
        failures = [
            Failure(index, error) for index, error in enumerate(answer) if error is not None
        ]
        self._is_open = not any(isinstance(one.error, NotConnected | TimedOut) for one in failures)
        return PublishResult(failures=failures) if failures else ALL_ACCEPTED

    async def is_healthy(self) -> bool:
        return self._is_open

    async def aclose(self) -> None:
        self._is_open = False


async def test_a_transient_failure_is_repeated_in_order_until_all_is_accepted() -> None:
    line = Line()
    line.write(*(message(str(n)) for n in range(5)))
    line.faults.fail_next(3, Outage("away"))

    assert await line.run_to_the_end() is Ending.COMPLETED

    assert line.received == ["0", "1", "2", "3", "4"]
    assert [event.attempt for event in line.heard.of(Retried)] == [1, 2, 3]
    assert {event.side for event in line.heard.of(Retried)} == {"sink"}
    assert line.acknowledged == 5


async def test_a_message_that_fails_for_a_while_holds_those_behind_it_and_repeats_none() -> None:
    line = Line()
    line.write(*(message(str(n)) for n in range(5)))
    line.faults.refused["2"] = Outage("busy")

    async with line.running():
        await line.heard.until(lambda: len(line.heard.of(Retried)) >= 2)
        assert line.received == ["0", "1"]
        del line.faults.refused["2"]
        await line.heard.until(lambda: line.acknowledged == 5)

    assert line.received == ["0", "1", "2", "3", "4"]


async def test_a_permanent_failure_goes_to_the_dead_letters_and_its_neighbours_through() -> None:
    line = Line()
    line.write(*(message(str(n)) for n in range(5)))
    line.faults.refused["2"] = POISON

    await line.run_to_the_end()

    assert line.received == ["0", "1", "3", "4"]
    (letter,) = line.letters.letters.values()
    assert letter.message.dedup_key == "2"
    assert (letter.error_kind, letter.error) == ("message", "not for this sink")
    (published,) = line.heard.of(BatchPublished)
    assert (published.messages, published.dead_lettered) == (4, 1)
    assert line.acknowledged == 5


async def test_dead_letters_of_one_reason_are_one_event() -> None:
    line = Line()
    line.write(*(message(str(n)) for n in range(5)))
    line.faults.refused |= {"1": POISON, "3": POISON, "4": MessageRejected("another reason")}

    await line.run_to_the_end()

    assert [(event.messages, event.error) for event in line.heard.of(DeadLettered)] == [
        (2, "not for this sink"),
        (1, "another reason"),
    ]


async def test_what_the_source_could_not_decode_becomes_a_dead_letter() -> None:
    line = Line()
    line.write(message("0"), message("1"))
    broken = line.here.records[1].encoded
    broken.headers.clear()
    line.here.records[1] = type(line.here.records[1])("orders", type(broken)(b"\xff", {}))

    await line.run_to_the_end()

    assert line.received == ["0"]
    (letter,) = line.letters.letters.values()
    assert letter.message.payload == b"\xff"


async def test_a_message_whose_time_has_no_zone_costs_only_itself() -> None:
    line = Line()
    timeless = datetime(2026, 1, 2)  # noqa: DTZ001 - as somebody else may write it
    line.write(message("0"), msgspec.structs.replace(message("1"), created_at=timeless))

    await line.run_to_the_end()

    assert line.received == ["0"]
    (letter,) = line.letters.letters.values()
    assert b'"dedup_key":"1"' in letter.message.payload
    assert "timezone" in letter.error


async def test_a_message_that_the_transform_refuses_becomes_a_dead_letter() -> None:
    def transform(one: RelayMessage) -> RelayMessage:
        if one.dedup_key == "1":
            raise MessageUndecodable("payload.city is missing")
        return one

    line = Line(transform=transform)
    line.write(*(message(str(n)) for n in range(3)))

    await line.run_to_the_end()

    assert line.received == ["0", "2"]
    assert line.letters.keys == ["1"]


async def test_nothing_is_acknowledged_before_its_dead_letters_are_durable() -> None:
    line = Line()
    line.write(message("0"), message("1"))
    line.faults.refused["0"] = POISON
    line.letters.outages = 3

    async with line.running():
        await line.heard.until(lambda: line.letters.tried == 3)
        assert line.acknowledged == 0
        await line.heard.until(lambda: line.acknowledged == 2)

    assert line.letters.keys == ["0"]
    assert len(line.heard.of(Retried)) == 3


async def test_a_dead_letter_write_that_succeeds_at_last_ends_the_retrying() -> None:
    def transform(one: RelayMessage) -> RelayMessage:
        raise MessageUndecodable(f"{one.dedup_key} has no city")

    line = Line(transform=transform)
    line.write(message("0"))
    line.letters.outages = 1

    async with line.running():
        await line.heard.until(lambda: line.acknowledged == 1)
        assert line.heard.states[-1] is PipelineState.RUNNING


async def test_the_breaker_suspends_probes_and_puts_back_the_suspects() -> None:
    line = Line(policy=RetryPolicy(initial_s=0.001, max_s=0.002, breaker_threshold=5), batch_size=2)
    keys = [str(n) for n in range(8)]
    line.write(*(message(key) for key in keys))
    line.faults.refused |= dict.fromkeys(keys, POISON)

    async with line.running():
        await line.heard.until(lambda: PipelineState.SUSPENDED in line.heard.states)
        assert line.letters.keys == ["0", "1", "2", "3"]
        assert line.received == []
        line.faults.refused.clear()
        await line.heard.until(lambda: line.acknowledged == 8 and not line.letters.letters)
        await line.heard.until(lambda: line.heard.states[-1] is PipelineState.RUNNING)

    assert sorted(line.received) == keys
    assert "rejected 6 messages in a row" in next(
        event.reason
        for event in line.heard.of(StateChanged)
        if event.state is PipelineState.SUSPENDED
    )


async def test_one_success_between_rejections_keeps_the_breaker_closed() -> None:
    line = Line(policy=RetryPolicy(initial_s=0.001, max_s=0.002, breaker_threshold=3), batch_size=3)
    line.write(*(message(str(n)) for n in range(12)))
    line.faults.refused |= {str(n): POISON for n in range(12) if n % 3}

    await line.run_to_the_end()

    assert line.received == ["0", "3", "6", "9"]
    assert PipelineState.SUSPENDED not in line.heard.states


async def test_what_is_found_before_sending_says_nothing_about_the_sink() -> None:
    line = Line(policy=RetryPolicy(initial_s=0.001, max_s=0.002, breaker_threshold=2), batch_size=1)
    line.there.oversize_bytes = 10
    line.write(*(message(str(n)) for n in range(6)))

    await line.run_to_the_end()

    assert len(line.letters.letters) == 6
    assert PipelineState.SUSPENDED not in line.heard.states


async def test_a_probe_lets_no_message_overtake_another_of_its_key() -> None:
    line = Line(policy=RetryPolicy(initial_s=0.001, max_s=0.002, breaker_threshold=1))
    line.write(message("a1", entity="a"), message("a2", entity="a"), message("b1", entity="b"))
    line.faults.refused |= dict.fromkeys(("a1", "a2", "b1"), POISON)

    async with line.running():
        await line.heard.until(lambda: PipelineState.SUSPENDED in line.heard.states)
        del line.faults.refused["a2"], line.faults.refused["b1"]
        await line.heard.until(lambda: line.acknowledged == 3)

    assert line.received[0] == "b1"
    assert line.letters.keys == ["a1"]


async def test_after_max_attempts_what_still_fails_becomes_a_dead_letter() -> None:
    line = Line(policy=RetryPolicy(initial_s=0.001, max_s=0.002, max_attempts=3))
    line.write(message("0"), message("1"))
    line.faults.refused["1"] = Outage("busy")

    await line.run_to_the_end()

    assert line.received == ["0"]
    (letter,) = line.letters.letters.values()
    assert (letter.attempts, letter.error_kind) == (3, ErrorKind.OUTAGE.value)


async def test_a_lost_connection_is_made_again_before_the_batch_is_repeated() -> None:
    line = Line()
    line.write(message("0"))
    line.there.cut()

    async with line.running():
        await line.heard.until(lambda: bool(line.heard.of(Retried)))
        line.there.restore()
        await line.heard.until(lambda: line.acknowledged == 1)

    assert line.received == ["0"]


async def test_a_configuration_error_of_the_sink_fails_the_pipeline_with_its_reason() -> None:
    line = Line()
    line.write(message("0"))
    line.faults.refused["0"] = ConfigurationError("no such stream", remedy="make it")

    async with line.running():
        await line.heard.until(lambda: PipelineState.FAILED in line.heard.states)

    failed = [one for one in line.heard.of(StateChanged) if one.state is PipelineState.FAILED]
    assert [one.reason for one in failed] == ["no such stream (make it)"]
    assert line.acknowledged == 0


async def test_a_dead_letter_is_published_again_when_somebody_asks() -> None:
    line = Line()
    line.write(message("0"))
    line.faults.refused["0"] = POISON

    async with line.running():
        await line.heard.until(lambda: line.acknowledged == 1)
        line.faults.refused.clear()
        line.letters.requested = list(line.letters.letters)
        line.pipeline.retry_dead_letters()
        await line.heard.until(lambda: bool(line.heard.of(DeadLettersRetried)))

    assert line.received == ["0"]
    assert line.letters.letters == {}


async def test_a_dead_letter_that_is_rejected_again_keeps_its_place_with_the_new_reason() -> None:
    line = Line()
    line.write(message("0"))
    line.faults.refused["0"] = POISON

    async with line.running():
        await line.heard.until(lambda: line.acknowledged == 1)
        line.faults.refused["0"] = MessageRejected("still not")
        line.letters.requested = list(line.letters.letters)
        line.pipeline.retry_dead_letters()
        await line.heard.until(lambda: bool(line.heard.of(DeadLettersRetried)))

    assert line.letters.failed == {1: "still not"}
    assert line.heard.of(DeadLettersRetried)[0].failed == 1


async def test_a_dead_letter_that_the_transform_refused_is_transformed_when_retried() -> None:
    is_strict = True

    def transform(one: RelayMessage) -> RelayMessage:
        if is_strict:
            raise MessageUndecodable("payload.city is missing")
        return RelayMessage(dedup_key=one.dedup_key, payload=one.payload, subject="set")

    line = Line(transform=transform)
    line.write(message("0"))

    async with line.running():
        await line.heard.until(lambda: line.acknowledged == 1)
        is_strict = False
        line.letters.requested = list(line.letters.letters)
        line.pipeline.retry_dead_letters()
        await line.heard.until(lambda: bool(line.heard.of(DeadLettersRetried)))

    assert [record.subject for record in line.there.records] == ["set"]


async def test_duplicates_that_the_sink_reports_are_told() -> None:
    class Knowing:
        async def connect(self) -> None: ...

        def subject_of(self, message: RelayMessage) -> str:
            return message.subject

        async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
            return PublishResult(duplicates=len(messages) - 1)

        async def is_healthy(self) -> bool:
            return True

        async def aclose(self) -> None: ...

    line = Line(sink=Knowing())
    line.write(*(message(str(n)) for n in range(3)))

    await line.run_to_the_end()

    assert line.heard.of(BatchPublished)[0].duplicates == 2


async def test_a_stop_during_an_outage_releases_the_batch_and_dead_letters_nothing() -> None:
    line = Line(policy=RetryPolicy(initial_s=60, max_s=60))
    line.write(message("0"), message("1"))
    line.faults.fail_next(100, NotConnected("away"))

    async with line.running() as run:
        await line.heard.until(lambda: bool(line.heard.of(Retried)))

    assert run.result() is Ending.STOPPED
    assert line.here.take(10) == [0, 1]
    assert line.letters.letters == {}


async def test_max_attempts_dead_letters_the_one_that_fails_and_none_that_waits_behind_it() -> None:
    line = Line(policy=RetryPolicy(initial_s=0.001, max_s=0.002, max_attempts=3))
    line.write(*(message(str(n)) for n in range(4)))
    line.faults.refused["1"] = Outage("busy")

    await line.run_to_the_end()

    assert line.letters.keys == ["1"]
    assert line.received == ["0", "2", "3"]


@pytest.mark.parametrize("is_raised", [True, False])
async def test_what_is_wrong_with_the_configuration_is_looked_at_again_on_a_new_connection(
    is_raised: bool,
) -> None:
    class Stubborn(ScriptedSink):
        async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
            if self.connects > 1:
                return ALL_ACCEPTED
            error = ConfigurationError("not allowed")
            if is_raised:
                raise error
            return PublishResult(failures=[Failure(at, error) for at in range(len(messages))])

    line = Line(sink=Stubborn(), failed_retry_s=0.001)
    line.write(message("0"))

    await line.run_to_the_end()

    assert line.acknowledged == 1


async def test_max_attempts_dead_letters_none_that_was_held_back_before_the_failing_one() -> None:
    class Holding(ScriptedSink):
        async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
            if len(messages) == 1:
                return PublishResult()
            busy = Outage("busy")
            return PublishResult(failures=[Failure(0, busy, was_sent=False), Failure(1, busy)])

    policy = RetryPolicy(initial_s=0.001, max_s=0.002, max_attempts=2)
    line = Line(sink=Holding(), policy=policy)
    line.write(message("0"), message("1"))

    await line.run_to_the_end()

    assert line.letters.keys == ["1"]


async def test_a_letter_that_the_sink_refused_is_not_transformed_again() -> None:
    def transform(one: RelayMessage) -> RelayMessage:
        return RelayMessage(
            dedup_key=f"{one.dedup_key}+", payload=one.payload, subject=f"{one.subject}+"
        )

    line = Line(transform=transform)
    line.write(message("0"))
    line.faults.refused["0+"] = POISON

    async with line.running():
        await line.heard.until(lambda: line.acknowledged == 1)
        line.faults.refused.clear()
        line.letters.requested = list(line.letters.letters)
        line.pipeline.retry_dead_letters()
        await line.heard.until(lambda: bool(line.heard.of(DeadLettersRetried)))

    assert line.received == ["0+"]
    assert [record.subject for record in line.there.records] == ["+"]


async def test_a_letter_that_the_transform_refuses_again_fails_with_its_reason() -> None:
    def transform(one: RelayMessage) -> RelayMessage:
        raise MessageUndecodable("payload.city is missing")

    line = Line(transform=transform)
    line.write(message("0"))

    async with line.running():
        await line.heard.until(lambda: line.acknowledged == 1)
        line.letters.requested = list(line.letters.letters)
        line.pipeline.retry_dead_letters()
        await line.heard.until(lambda: bool(line.heard.of(DeadLettersRetried)))

    assert line.letters.failed == {1: "payload.city is missing"}
    assert line.received == []


async def test_a_stop_while_suspended_leaves_the_suspects_requested() -> None:
    line = Line(policy=RetryPolicy(initial_s=60, max_s=60, breaker_threshold=3), batch_size=2)
    line.write(*(message(str(n)) for n in range(4)))
    line.faults.refused |= dict.fromkeys("0123", POISON)

    async with line.running():
        await line.heard.until(lambda: PipelineState.SUSPENDED in line.heard.states)

    assert line.letters.keys == ["0", "1"]
    assert line.letters.requested == [1, 2]


async def test_what_is_purged_while_the_sink_is_suspended_is_not_sent() -> None:
    line = Line(policy=RetryPolicy(initial_s=0.001, max_s=0.002, breaker_threshold=3), batch_size=2)
    keys = ["0", "1", "2", "3"]
    line.write(*(message(key) for key in keys))
    line.faults.refused |= dict.fromkeys(keys, POISON)

    async with line.running():
        await line.heard.until(lambda: PipelineState.SUSPENDED in line.heard.states)
        # Whoever wants to send them has had every chance to take them.
        for _ in range(100):
            await asyncio.sleep(0)
        line.letters.letters.clear()
        line.letters.requested.clear()
        line.faults.refused.clear()
        await line.heard.until(lambda: line.acknowledged == 4)

    assert line.received == ["2", "3"]


async def test_what_another_relay_had_taken_when_it_died_is_found_without_being_told() -> None:
    line = Line(dead_letter_lease_s=60)
    line.write(message("0"))
    line.faults.refused["0"] = POISON

    async with line.running():
        await line.heard.until(lambda: line.acknowledged == 1)
        line.faults.refused.clear()
        line.letters.requested = list(line.letters.letters)
        await line.heard.until(lambda: bool(line.heard.of(DeadLettersRetried)))

    assert line.received == ["0"]


async def test_a_stop_lets_the_retry_in_hand_finish_and_repeats_nothing_later() -> None:
    line = Line()
    line.write(message("0"))
    line.faults.refused["0"] = POISON
    is_stored = asyncio.Event()

    async with line.running():
        await line.heard.until(lambda: line.acknowledged == 1)
        line.faults.refused.clear()
        line.letters.requested = list(line.letters.letters)
        line.faults.accepting.clear()
        line.there.wait_on(is_stored)
        line.pipeline.retry_dead_letters()
        async with asyncio.timeout(BOUND_S):
            await is_stored.wait()
        line.pipeline.stop()
        # Whoever wants to cut it off has had every chance.
        for _ in range(100):
            await asyncio.sleep(0)
        line.faults.accepting.set()

    assert line.received == ["0"]
    assert line.letters.requested == []


async def test_what_a_batch_had_come_to_is_told_when_a_stop_interrupts_it() -> None:
    line = Line(policy=RetryPolicy(initial_s=60, max_s=60))
    line.write(*(message(str(n)) for n in range(3)))
    line.faults.refused["2"] = Outage("busy")

    async with line.running():
        await line.heard.until(lambda: bool(line.heard.of(Retried)))

    assert [event.messages for event in line.heard.of(BatchPublished)] == [2]
    assert line.acknowledged == 0


async def test_an_outage_of_the_dead_letters_does_not_end_the_session() -> None:
    class Away(KeptLetters):
        async def take_dead_letters(self, _: str, __: int, ___: int) -> list[StoredDeadLetter]:
            self.tried += 1
            raise Outage("the catalog is away")

    line = Line(letters=Away())
    line.write(message("0"))

    async with line.running():
        await line.heard.until(lambda: line.acknowledged == 1)

    assert line.letters.tried == 1
    assert line.heard.of(Retried) == []


async def test_what_a_sink_says_of_its_broker_comes_with_its_connection() -> None:
    class Telling(MemorySink):
        async def describe(self) -> Mapping[str, str]:
            return {"server": "here"}

    class Silent(MemorySink):
        async def describe(self) -> Mapping[str, str]:
            raise Outage("no answer")

    told = []
    for kind in (Telling, Silent, MemorySink):
        line = Line(sink=kind(MemoryChannel()))
        await line.run_to_the_end()
        told += [
            event.details
            for event in line.heard.of(ConnectionChanged)
            if event.side == "sink" and event.is_connected
        ]

    assert told == [{"server": "here"}, {}, {}]


@pytest.mark.parametrize("raised", [True, False])
async def test_a_sink_that_asks_for_patience_is_not_tried_before(*, raised: bool) -> None:
    busy = Outage("busy", retry_after_s=0.5)
    sink = ScriptedSink(busy if raised else [busy, busy])
    line = Line(sink=sink)
    line.write(message("0"), message("1"))

    await line.run_to_the_end()

    assert sink.published == [["0", "1"]] * 2
    assert sink.times_s[1] - sink.times_s[0] >= 0.5
    (retried,) = line.heard.of(Retried)
    assert 0.4 < retried.delay_s <= 0.5
    assert line.acknowledged == 2


async def test_the_longest_patience_counts_that_any_message_asks_for() -> None:
    asked = [
        None,
        Outage("busy"),
        Outage("very busy", retry_after_s=0.5),
        Outage("busy", retry_after_s=0.1),
    ]
    sink = ScriptedSink(asked)
    line = Line(sink=sink)
    line.write(*(message(str(n)) for n in range(4)))

    await line.run_to_the_end()

    assert sink.published == [["0", "1", "2", "3"], ["1", "2", "3"]]
    assert sink.times_s[1] - sink.times_s[0] >= 0.5
    assert [event.error for event in line.heard.of(Retried)] == ["very busy"]


async def test_a_shorter_patience_than_the_back_off_changes_nothing() -> None:
    sink = ScriptedSink([Outage("busy", retry_after_s=0.01)])
    line = Line(sink=sink, policy=RetryPolicy(initial_s=0.4, max_s=0.4))
    line.write(message("0"))

    await line.run_to_the_end()

    (retried,) = line.heard.of(Retried)
    assert 0.2 <= retried.delay_s <= 0.4


async def test_nobody_has_more_patience_than_an_hour_and_a_stop_ends_it_at_once() -> None:
    sink = ScriptedSink([Outage("away", retry_after_s=1e12)])
    line = Line(sink=sink)
    line.write(message("0"))

    async with line.running() as run:
        await line.heard.until(lambda: bool(line.heard.of(Retried)))

    (retried,) = line.heard.of(Retried)
    assert LONGEST_ASKED_WAIT_S - 1 < retried.delay_s <= LONGEST_ASKED_WAIT_S
    assert run.result() is Ending.STOPPED
    assert line.here.take(10) == [0]


async def test_connecting_waits_as_long_as_the_destination_asks_for() -> None:
    class Busy(ScriptedSink):
        async def connect(self) -> None:
            await super().connect()
            self.times_s.append(time.monotonic())
            if self.connects == 1:
                raise Outage("busy", retry_after_s=0.5)

    sink = Busy()
    line = Line(sink=sink)
    line.write(message("0"))

    await line.run_to_the_end()

    assert sink.times_s[1] - sink.times_s[0] >= 0.5
    assert line.acknowledged == 1


async def test_what_comes_after_a_dead_lettered_message_waits_as_long_as_it_was_asked_to() -> None:
    sink = ScriptedSink([Outage("busy", retry_after_s=0.5)])
    line = Line(
        sink=sink, policy=RetryPolicy(initial_s=0.001, max_s=0.002, max_attempts=1), batch_size=1
    )
    line.write(message("0"), message("1"))

    await line.run_to_the_end()

    assert line.letters.keys == ["0"]
    assert sink.published == [["0"], ["1"]]
    assert sink.times_s[1] - sink.times_s[0] >= 0.5
    waiting = [one for one in line.heard.of(StateChanged) if one.reason == "busy"]
    assert [one.state for one in waiting] == [PipelineState.RETRYING]


async def test_dead_letters_are_not_sent_while_the_destination_asks_to_back_off() -> None:
    sink = ScriptedSink([POISON], [Outage("busy", retry_after_s=0.5)])
    line = Line(sink=sink)
    line.write(message("0"))

    async with line.running():
        await line.heard.until(lambda: line.acknowledged == 1)
        line.letters.requested = list(line.letters.letters)
        line.pipeline.retry_dead_letters()
        await line.heard.until(lambda: not line.letters.letters)

    assert sink.published == [["0"]] * 3
    assert sink.times_s[2] - sink.times_s[1] >= 0.5


@pytest.mark.parametrize("gone", [NotConnected("lost"), TimedOut("no answer")])
async def test_a_connection_that_was_lost_under_single_messages_is_made_again_at_once(
    gone: Outage,
) -> None:
    sink = ScriptedSink([None, gone, gone])
    line = Line(sink=sink)
    line.write(*(message(str(n)) for n in range(3)))

    await line.run_to_the_end()

    # One step of the back-off, not a second one to find out that the connection is of no use.
    assert [event.error for event in line.heard.of(Retried)] == [str(gone)]
    assert sink.published == [["0", "1", "2"], ["1", "2"]]
    assert sink.connects == 2
    told = [one.is_connected for one in line.heard.of(ConnectionChanged) if one.side == "sink"]
    assert told == [True, False, True, False]


async def test_a_sink_that_is_merely_busy_keeps_its_connection() -> None:
    sink = ScriptedSink([Outage("busy")])
    line = Line(sink=sink)
    line.write(message("0"))

    await line.run_to_the_end()

    assert sink.connects == 1
