"""The check that keeps private words out: what it finds, and what it leaves alone."""

from __future__ import annotations

import pytest

from scripts.glossary import private_words


@pytest.mark.parametrize(
    "text, better",
    [
        ("# The far side is away.", "broker, or destination"),
        ("far_side = FarSide()", "broker, or destination"),
        ("async def test_so_many_are_under_way_at_once() -> None:", "in flight"),
        ("def test_a_batch_that_is_given_back() -> None:", "release, or nack"),
        ("batches that are out", "in flight, or unacknowledged"),
    ],
)
def test_a_private_word_is_found_with_its_line_and_the_better_word(text: str, better: str) -> None:
    (first, *_) = private_words(f"fine\n{text}")

    assert (first[0], first[2]) == (2, better)


@pytest.mark.parametrize(
    "text", ["it is out of reach", "settled and put back", "the background", "an answer"]
)
def test_an_ordinary_word_is_left_alone(text: str) -> None:
    assert not list(private_words(text))
