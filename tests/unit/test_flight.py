"""The bookkeeping of a publish: order by key, failures, and nothing forgotten."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import ErrorKind, MessageRejected, Outage
from relay.flight import Flight
from relay.message import RelayMessage


def messages(keys: list[str | None]) -> list[RelayMessage]:
    return [
        RelayMessage(dedup_key=str(index), key=key, payload=b"{}") for index, key in enumerate(keys)
    ]


def taken(flight: Flight) -> list[int]:
    found = []
    while (index := flight.take()) is not None:
        found.append(index)
    return found


def test_a_strict_flight_sends_one_message_of_each_key_at_a_time() -> None:
    flight = Flight(messages(["a", "a", "b", None, None, "a"]), is_strict=True, window=10)

    assert taken(flight) == [0, 2, 3, 4]
    flight.accept([0])
    assert taken(flight) == [1]
    flight.accept([1])
    assert taken(flight) == [5]


def test_a_pipelined_flight_sends_all_that_the_window_holds() -> None:
    flight = Flight(messages(["a"] * 5), is_strict=False, window=3)

    assert taken(flight) == [0, 1, 2]
    flight.accept([1])
    assert taken(flight) == [3]


def test_nothing_is_sent_after_a_transient_failure_and_the_rest_fails_with_it() -> None:
    flight = Flight(messages(["a", "b", "a", "c", "d"]), is_strict=True, window=2)
    assert taken(flight) == [0, 1]

    outage = Outage("full")
    flight.fail(0, outage)
    assert taken(flight) == []
    flight.accept([1])

    assert flight.is_over
    assert [(one.index, one.error) for one in flight.failures()] == [
        (index, outage) for index in (0, 2, 3, 4)
    ]


def test_a_rejected_message_is_followed_by_its_successor() -> None:
    flight = Flight(messages(["a", "a"]), is_strict=True, window=2)
    assert taken(flight) == [0]

    flight.fail(0, MessageRejected("bad"))

    assert taken(flight) == [1]


def test_numbers_of_nothing_in_flight_settle_nothing() -> None:
    flight = Flight(messages([None] * 3), is_strict=True, window=2)
    assert taken(flight) == [0, 1]

    flight.accept([-1, -3, 2, 3, 1, 1])

    assert flight.in_flight() == [0]
    assert [flight.is_in_flight(index) for index in (-3, 0, 1, 2, 3)] == [
        False,
        True,
        False,
        False,
        False,
    ]


def test_a_chunk_has_what_single_takes_would_give_in_the_same_order() -> None:
    flight = Flight(messages(["a", "b", "a", "c", "d"]), is_strict=True, window=3)
    assert list(flight.take_chunk(2, 99)) == [0, 1]
    assert list(flight.take_chunk(9, 99)) == [3]
    assert list(flight.take_chunk(9, 99)) == []

    flight.accept([0, 1, 3])

    assert list(flight.take_chunk(9, 99)) == [2, 4]
    assert flight.in_flight() == [2, 4]

    free = Flight(messages(["a", "b", "c", "d"]), is_strict=True, window=3)
    assert list(free.take_chunk(2, 99)) == [0, 1]
    assert list(free.take_chunk(9, 99)) == [2]
    assert list(free.take_chunk(9, 99)) == []
    free.fail(0, Outage("full"))
    free.accept([1, 2])
    assert list(free.take_chunk(9, 99)) == []
    assert [(one.index, one.was_sent) for one in free.failures()] == [(0, True), (3, False)]


@pytest.mark.parametrize("keys", [["a", "b", "c", "d", "e"], ["a", "b", "c", "c", "d"]])
def test_what_is_put_back_is_next_and_comes_before_what_waited_for_its_key(
    keys: list[str],
) -> None:
    flight = Flight(messages(keys), is_strict=True, window=9)
    chunk = flight.take_chunk(3, 99)

    flight.put_back(chunk[1:])

    assert flight.in_flight() == [0]
    assert taken(flight) == ([1, 2, 3, 4] if keys[3] == "d" else [1, 2, 4])
    flight.accept([2])
    assert taken(flight) == ([] if keys[3] == "d" else [3])
    flight.accept(range(5))
    assert flight.is_over


def test_a_chunk_ends_with_the_message_that_reaches_its_bytes() -> None:
    flight = Flight(messages(["a", "b", "c", "d", "e"]), is_strict=True, window=9)

    assert list(flight.take_chunk(9, 3)) == [0, 1]
    assert list(flight.take_chunk(9, 1)) == [2]
    assert list(flight.take_chunk(1, 99)) == [3]
    assert flight.in_flight() == [0, 1, 2, 3]


def test_the_bytes_in_flight_are_those_of_unsettled_messages() -> None:
    flight = Flight(messages(["a", "b"]), is_strict=True, window=2)
    for index in taken(flight):
        flight.weigh(index, 10 + index)
    assert flight.bytes_in_flight == 21

    flight.accept([1])

    assert flight.bytes_in_flight == 10


@given(
    keys=st.lists(st.sampled_from(["a", "b", "c", None]), max_size=40),
    window=st.integers(1, 8),
    is_strict=st.booleans(),
    seed=st.integers(),
)
def test_whatever_happens_every_message_is_settled_once_and_keys_keep_their_order(
    keys: list[str | None], window: int, is_strict: bool, seed: int
) -> None:
    chance = random.Random(seed)
    flight = Flight(messages(keys), is_strict=is_strict, window=window)
    accepted: list[int] = []
    while not flight.is_over:
        if chance.random() < 0.5:
            chunk = flight.take_chunk(4, 99)
            flight.put_back(chunk[chance.randint(1, 4) :])
        taken(flight)
        in_flight = flight.in_flight()
        assert len(in_flight) <= window
        flying = [keys[index] for index in in_flight if keys[index] is not None]
        assert not is_strict or len(flying) == len(set(flying))
        index = chance.choice(in_flight)
        what = chance.random()
        if what < 0.2:
            several = in_flight[: chance.randint(2, 8)]
            flight.accept(several)
            accepted += several
        elif what < 0.8:
            flight.accept([index])
            accepted.append(index)
        elif what < 0.95:
            flight.fail(index, MessageRejected("bad"))
        else:
            flight.fail(index, Outage("away"))

    failures = flight.failures()
    assert sorted([*accepted, *(one.index for one in failures)]) == list(range(len(keys)))
    if is_strict:
        transient = {one.index for one in failures if one.error.kind is ErrorKind.OUTAGE}
        for key in {key for key in keys if key is not None}:
            of_key = [index for index in accepted if keys[index] == key]
            assert of_key == sorted(of_key)
            waiting = [index for index in transient if keys[index] == key]
            assert not waiting or not of_key or max(of_key) < min(waiting)
