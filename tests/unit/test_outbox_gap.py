"""The bookkeeping of pending gaps, without a database."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from relay.backends.outbox.gap import MAX_ID, NOBODY, GapBook, LockView

W = frozenset({"3/1"})
WA = frozenset({"3/1", "4/9"})


def look(holders: frozenset[str], *, finishing: frozenset[str] = NOBODY) -> LockView:
    return LockView(holders, holders - finishing, "today")


def round_of(
    book: GapBook, ids: Sequence[int], locks: LockView, *, limit: int = 100
) -> Sequence[tuple[int, int]]:
    """One round: what was asked for along with the new rows."""
    question = book.question(limit)
    book.absorb(question, ids, locks.holders)
    book.observe(locks)
    return list(zip(question.firsts, question.lasts, strict=True))


def opened(book: GapBook) -> Iterable[tuple[int, int]]:
    return book.delta(100).opened


def test_ids_without_holes_leave_no_gap() -> None:
    book = GapBook(4)

    round_of(book, [5, 6, 7], look(W))

    assert book.position == 7
    assert not book.has_gaps


def test_a_new_hole_is_a_range_and_is_read_again_once() -> None:
    book = GapBook(0)

    assert round_of(book, [1, 5], look(W)) == []
    assert book.delta(100).opened == [(2, 4)]
    assert round_of(book, [], look(W)) == [(2, 4)]
    assert round_of(book, [], look(W)) == []
    assert len(book) == 1


def test_a_gap_without_holders_dies_after_one_fresh_read() -> None:
    book = GapBook(0)
    round_of(book, [1, 3], look(NOBODY))
    book.delta(100)

    assert round_of(book, [], look(NOBODY)) == [(2, 2)]

    assert not book.has_gaps
    assert book.delta(100).closed == [2]


def test_a_gap_is_read_once_more_after_its_last_holder_has_gone() -> None:
    book = GapBook(0)
    round_of(book, [1, 3], look(W))
    round_of(book, [], look(NOBODY))  # read before the holder was seen to be gone: proves nothing
    assert book.has_gaps

    assert round_of(book, [], look(NOBODY)) == [(2, 2)]

    assert not book.has_gaps


def test_a_row_found_inside_splits_the_gap() -> None:
    book = GapBook(0)
    round_of(book, [1, 9], look(W))
    book.delta(100)

    round_of(book, [4, 7], look(W))
    # The read ended at 7: what lies behind has not been answered.
    delta = book.delta(100)

    assert delta.closed == [2]
    assert sorted(delta.opened) == [(2, 3), (5, 6), (8, 8)]
    assert round_of(book, [], look(W)) == [(8, 8)]


def test_a_gap_that_opens_and_closes_between_two_commits_is_never_written() -> None:
    book = GapBook(0)
    round_of(book, [1, 3], look(NOBODY))
    round_of(book, [2], look(NOBODY))

    delta = book.delta(100)

    assert (delta.position, list(delta.closed), list(delta.opened)) == (3, [], [])


def test_gaps_that_wait_for_the_same_holders_become_one_cohort() -> None:
    book = GapBook(0)
    round_of(book, [1, 3], look(WA))
    round_of(book, [5], look(W))
    for _ in range(3):
        round_of(book, [], look(W))

    assert len(book) == 2
    assert round_of(book, [], look(NOBODY)) == []
    assert round_of(book, [], look(NOBODY)) == [(2, 2), (4, 4)]


def test_a_holder_that_may_have_ended_makes_its_cohort_due() -> None:
    book = GapBook(0)
    round_of(book, [1, 3], look(W))
    round_of(book, [], look(W))
    finishing = look(W, finishing=W)

    assert book.rests_surely(look(W))
    assert not book.rests_surely(finishing)
    book.observe(finishing)

    assert book.has_due_gaps


def test_more_due_gaps_than_fit_are_asked_for_in_order_of_id() -> None:
    book = GapBook(0)
    round_of(book, range(2, 21, 2), look(NOBODY))

    asked = [round_of(book, [], look(NOBODY), limit=4) for _ in range(3)]

    assert [gap for part in asked for gap in part] == [(n, n) for n in range(1, 20, 2)]
    assert not book.has_gaps


def test_a_read_that_was_cut_leaves_the_rest_due() -> None:
    book = GapBook(0)
    round_of(book, [10, 20], look(NOBODY))

    round_of(book, [3], look(NOBODY))

    assert round_of(book, [], look(NOBODY)) == [(4, 9), (11, 19)]


def test_dead_gaps_are_committed_in_bounded_portions() -> None:
    book = GapBook(100)
    book.load(range(1, 20, 2), range(1, 20, 2), NOBODY)
    round_of(book, [], look(NOBODY))

    assert len(book.delta(4).closed) == 4
    assert book.has_changes
    assert len(book.delta(100).closed) == 6
    assert not book.has_changes


def test_after_a_server_start_every_gap_is_noted_afresh() -> None:
    book = GapBook(0)
    round_of(book, [1, 3], look(W))
    round_of(book, [5], look(WA))
    round_of(book, [], look(WA))

    book.note_afresh(frozenset({"-1/700"}))

    question = book.question(100)
    assert list(question.firsts) == [2, 4]
    assert list(question.holders) == [frozenset({"-1/700"})]


def test_a_hole_as_wide_as_the_id_space_is_one_range() -> None:
    book = GapBook(0)

    round_of(book, [MAX_ID], look(W))

    assert list(opened(book)) == [(1, MAX_ID - 1)]
