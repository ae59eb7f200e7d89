"""Which message may be sent next, and what becomes of those that were not."""

from __future__ import annotations

from relay.backends.webhook.flight import Flight
from relay.errors import MessageRejected, Outage


def taken(flight: Flight) -> list[int]:
    found: list[int] = []
    while (index := flight.take()) is not None:
        found.append(index)
    return found


def test_a_message_waits_for_the_one_before_it_of_its_own_key() -> None:
    flight = Flight(["a", "b", "a", None, "a", None], is_strict=True)

    assert taken(flight) == [0, 1, 3, 5]
    flight.land(0, None)
    assert taken(flight) == [2]
    flight.land(1, None)
    assert taken(flight) == []
    flight.land(2, MessageRejected("bad"))
    assert taken(flight) == [4]


def test_without_strictness_nothing_waits() -> None:
    assert taken(Flight(["a", "a", "a"], is_strict=False)) == [0, 1, 2]


def test_an_outage_grounds_what_was_not_sent_and_a_rejection_does_not() -> None:
    flight = Flight(["a", "a", "b", "c", "a"], is_strict=True)
    outage = Outage("away")
    assert [flight.take(), flight.take()] == [0, 2]

    flight.land(2, MessageRejected("bad"))
    assert flight.take() == 3
    flight.land(0, outage)
    flight.land(3, None)

    assert flight.take() is None
    flight.fail_unsent()
    assert sorted(flight.errors) == [0, 1, 2, 4]
    assert {index for index, error in flight.errors.items() if error is outage} == {0, 1, 4}


def test_what_was_under_way_when_it_was_grounded_still_counts() -> None:
    flight = Flight(["a", "b"], is_strict=True)
    assert taken(flight) == [0, 1]

    flight.land(0, Outage("away"))
    flight.land(1, None)
    flight.fail_unsent()

    assert list(flight.errors) == [0]
