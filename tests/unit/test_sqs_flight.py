"""Batches in flight: how full they are, what waits for what, and where it stops."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from relay.backends.sqs.flight import Flight
from relay.errors import MessageRejected, Outage


def flight_of(
    groups: Sequence[str | None],
    *,
    keys: Sequence[str | None] | None = None,
    sizes: Sequence[int] | None = None,
    batch_bytes: int = 1000,
) -> Flight:
    return Flight(
        groups,
        sizes or [1] * len(groups),
        keys=groups if keys is None else keys,
        batch_bytes=batch_bytes,
    )


def batches_of(flight: Flight) -> list[list[int]]:
    """All batches, each landing before the next is taken."""
    batches = []
    while batch := flight.take():
        batches.append(batch)
        flight.settle(batch, {})
    return batches


def test_messages_without_a_group_go_in_order_ten_at_a_time() -> None:
    flight = flight_of([None] * 25)

    batches = [flight.take() for _ in range(4)]

    assert batches == [[*range(10)], [*range(10, 20)], [*range(20, 25)], []]


def test_a_batch_ends_where_its_bytes_would_be_exceeded() -> None:
    flight = flight_of([None] * 5, sizes=[400, 400, 400, 1000, 1], batch_bytes=1000)

    assert batches_of(flight) == [[0, 1], [2], [3], [4]]


def test_a_group_behind_another_ends_a_batch_by_its_bytes_too() -> None:
    flight = flight_of(["a", "a", "b"], keys=[None] * 3, sizes=[400, 700, 400], batch_bytes=1000)

    assert batches_of(flight) == [[0, 2], [1]]


def test_of_one_key_only_one_message_is_in_flight() -> None:
    flight = flight_of(["a", "a", "b", "a", "c"])

    first = flight.take()
    assert first == [0, 2, 4]
    assert flight.take() == []
    flight.settle(first, {})

    assert batches_of(flight) == [[1], [3]]


@pytest.mark.parametrize(
    "keys, batches",
    [
        ([None, None, None], [[0, 1, 2]]),
        (["x", "y", "x"], [[0, 1], [2]]),
    ],
)
def test_a_batch_holds_several_of_a_group_but_one_of_a_key(
    keys: list[str | None], batches: list[list[int]]
) -> None:
    assert batches_of(flight_of(["g", "g", "g"], keys=keys)) == batches


def test_of_one_group_only_one_batch_is_in_flight() -> None:
    flight = flight_of(["g"] * 15, keys=[None] * 15)

    first = flight.take()
    assert first == [*range(10)]
    assert flight.take() == []
    flight.settle(first, {})

    assert flight.take() == [*range(10, 15)]


def test_what_has_waited_goes_before_what_has_not() -> None:
    flight = flight_of(["a", "a", *(f"k{number}" for number in range(20))])

    first = flight.take()
    flight.settle(first, {})

    assert flight.take()[0] == 1


def test_a_messages_own_failure_stops_nothing() -> None:
    flight = flight_of(["a", "a"])
    refused = MessageRejected("no")

    flight.settle(flight.take(), {0: refused})

    assert flight.take() == [1]
    flight.settle([1], {})
    flight.fail_unsent()
    assert flight.errors == {0: refused}


def test_an_outage_stops_everything_and_is_the_failure_of_all_that_was_not_sent() -> None:
    flight = flight_of(["a", "a", *(f"k{number}" for number in range(12))])
    first, second = flight.take(), flight.take()
    away = Outage("away")

    flight.settle(first, dict.fromkeys(first, away))
    assert flight.take() == []
    flight.settle(second, {})
    flight.fail_unsent()

    assert flight.errors.keys() == {*range(14)} - {*second}
    assert {id(error) for error in flight.errors.values()} == {id(away)}
    assert flight.unsent == flight.errors.keys() - {*first}
