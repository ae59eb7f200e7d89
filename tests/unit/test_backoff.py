"""Waiting between attempts."""

from __future__ import annotations

import pytest

from relay.backoff import LONGEST_ASKED_WAIT_S, Backoff


def test_the_ceiling_doubles_up_to_its_maximum() -> None:
    backoff = Backoff(1.0, 10.0, chance=lambda: 1.0)

    waits = [backoff.next_s() for _ in range(6)]

    assert waits == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_chance_takes_away_at_most_half() -> None:
    assert Backoff(1.0, 10.0, chance=lambda: 0.0).next_s() == 0.5


def test_a_success_starts_over() -> None:
    backoff = Backoff(1.0, 10.0, chance=lambda: 1.0)
    backoff.next_s()
    backoff.next_s()

    backoff.reset()

    assert backoff.attempt == 0
    assert backoff.next_s() == 1.0


def test_a_million_failures_later_the_wait_is_still_the_maximum() -> None:
    backoff = Backoff(1.0, 60.0, chance=lambda: 1.0)
    for _ in range(1_100):
        backoff.next_s()

    assert backoff.next_s() == 60.0


def test_what_the_destination_asks_for_is_granted_within_an_hour() -> None:
    backoff = Backoff(1.0, 10.0, chance=lambda: 1.0)

    waits = [backoff.next_s(asked_s) for asked_s in (None, 0.5, 7.0, 86_400.0)]

    assert waits == [1.0, 2.0, 7.0, LONGEST_ASKED_WAIT_S]
    assert backoff.next_s() == 10.0


@pytest.mark.parametrize("initial_s,max_s", [(0.0, 1.0), (2.0, 1.0)])
def test_senseless_bounds_are_refused(initial_s: float, max_s: float) -> None:
    with pytest.raises(ValueError, match="initial_s"):
        Backoff(initial_s, max_s)
