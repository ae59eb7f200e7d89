"""Pending gaps: ids below the position that were not visible when it passed them.

Gaps that wait for the same transactions form one *cohort*. A cohort rests while all of them are
surely open and costs nothing then, however many gaps it has; it becomes *due*, to be read again,
when it is new or when one of them may have ended. `docs/decisions/0001-commit-order.md` has the
rules and why they are sound. Here is the bookkeeping only: nothing in this module waits or reads.
"""

from __future__ import annotations

import itertools
import operator
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

Holders = frozenset[str]

NOBODY: Holders = frozenset()
MAX_ID = 2**63 - 1


class LockView(msgspec.Struct, frozen=True):
    """Who held the outbox's insert lock at one moment, by virtual transaction.

    ``surely_open``: those of them whose rows no statement before that moment can have seen.
    ``server_started_at``: the run of the server in which these names mean something.
    """

    holders: Holders
    surely_open: Holders
    server_started_at: str


class GapQuestion(msgspec.Struct, frozen=True):
    """The due gaps that one read asks about, by id; ``is_complete`` where these are all.

    ``holders``: of each range, or a single entry for all of them.
    """

    firsts: Sequence[int]
    lasts: Sequence[int]
    holders: Sequence[Holders]
    is_complete: bool


NO_QUESTION: Final = GapQuestion((), (), (), is_complete=True)


class PositionDelta(msgspec.Struct, frozen=True):
    """What a commit changes: the position, gaps that are no more (by first id), new ranges."""

    position: int
    closed: Sequence[int]
    opened: Sequence[tuple[int, int]]


class _Ranges:
    """Disjoint ranges with both ends included, 16 bytes each; the taken ones stand at the front."""

    __slots__ = ("_firsts", "_is_sorted", "_lasts", "_taken")

    def __init__(self) -> None:
        self._firsts = array("q")
        self._lasts = array("q")
        self._is_sorted = True
        self._taken = 0

    def __len__(self) -> int:
        return len(self._firsts) - self._taken

    def add(self, first: int, last: int) -> None:
        self.extend((first,), (last,))

    def extend(self, firsts: Iterable[int], lasts: Iterable[int]) -> None:
        """More ranges, in order among themselves."""
        joint = len(self._firsts)
        self._firsts.extend(firsts)
        self._lasts.extend(lasts)
        if 0 < joint < len(self._firsts) and self._firsts[joint] < self._firsts[joint - 1]:
            self._is_sorted = False

    def absorb(self, other: _Ranges) -> None:
        self._is_sorted = self._is_sorted and other._is_sorted
        self.extend(other._firsts[other._taken :], other._lasts[other._taken :])

    def head(self, limit: int) -> tuple[array[int], array[int]]:
        """The lowest ranges, in order."""
        self._sort()
        end = self._taken + limit
        return self._firsts[self._taken : end], self._lasts[self._taken : end]

    def take(self, count: int) -> None:
        self._taken += count

    def put_back_first(self, first: int, last: int) -> None:
        """What is left of the range that was just taken."""
        self._taken -= 1
        self._firsts[self._taken] = first
        self._lasts[self._taken] = last

    def _sort(self) -> None:
        if self._is_sorted:
            return
        # Disjoint ranges have their ends in the order of their beginnings.
        self._firsts = array("q", sorted(self._firsts[self._taken :]))
        self._lasts = array("q", sorted(self._lasts[self._taken :]))
        self._taken = 0
        self._is_sorted = True


class GapBook:
    """The position and the pending gaps of one reader, and what changed since the last commit."""

    def __init__(self, position: int) -> None:
        self._position = position
        self._resting: dict[Holders, _Ranges] = {}
        self._due: dict[Holders, _Ranges] = {}
        self._opened: dict[int, int] = {}
        self._closed: list[int] = []
        self._dead = array("q")

    @property
    def position(self) -> int:
        """The highest id that was read."""
        return self._position

    @property
    def has_gaps(self) -> bool:
        """True while any gap is pending."""
        return bool(self._resting or self._due)

    @property
    def has_due_gaps(self) -> bool:
        """True when the next read has gaps to ask about."""
        return bool(self._due)

    @property
    def has_changes(self) -> bool:
        """True when there is something to commit besides the position."""
        return bool(self._opened or self._closed or self._dead)

    def __len__(self) -> int:
        return sum(map(len, self._resting.values())) + sum(map(len, self._due.values()))

    def load(self, firsts: Sequence[int], lasts: Sequence[int], holders: Holders) -> None:
        """Take over gaps that are committed already; whoever holds the lock now may fill them."""
        if firsts:
            self._due.setdefault(holders, _Ranges()).extend(firsts, lasts)

    def note_afresh(self, holders: Holders) -> None:
        """Forget who was waited for: the names mean nothing any more."""
        everything = _Ranges()
        for ranges in (*self._resting.values(), *self._due.values()):
            everything.absorb(ranges)
        self._resting = {}
        self._due = {holders: everything} if len(everything) else {}

    def question(self, limit: int) -> GapQuestion:
        """The due gaps with the lowest ids, ``limit`` at most."""
        is_complete = sum(map(len, self._due.values())) <= limit
        if len(self._due) == 1:
            ((holders, ranges),) = self._due.items()
            return GapQuestion(*ranges.head(limit), [holders], is_complete)
        found = [
            (first, last, holders)
            for holders, ranges in self._due.items()
            for first, last in zip(*ranges.head(limit), strict=True)
        ]
        found.sort(key=operator.itemgetter(0))
        del found[limit:]
        return GapQuestion(
            [first for first, _, _ in found],
            [last for _, last, _ in found],
            [holders for _, _, holders in found],
            is_complete,
        )

    def rests_surely(self, locks: LockView) -> bool:
        """True when no holder of a cohort that rests can have ended before the last read."""
        return all(holders <= locks.surely_open for holders in self._resting)

    def observe(self, locks: LockView) -> None:
        """Drop the holders that are gone; a cohort of which one may have ended becomes due."""
        stirred = [holders for holders in self._resting if not holders <= locks.surely_open]
        shrunk = [holders for holders in self._due if not holders <= locks.holders]
        for cohorts, moving in ((self._due, shrunk), (self._resting, stirred)):
            for holders in moving:
                ranges = cohorts.pop(holders)
                remaining = holders & locks.holders
                present = self._due.setdefault(remaining, ranges)
                if present is not ranges:
                    present.absorb(ranges)

    def has_holes(self, ids: Sequence[int]) -> bool:
        """True when ids are missing between the position and the last of these."""
        known = bisect_right(ids, self._position)
        return known < len(ids) and ids[-1] - self._position != len(ids) - known

    def absorb(self, question: GapQuestion, ids: Sequence[int], holders: Holders) -> None:
        """Take note of what one read returned, in ascending order.

        ``holders``: of the lock, seen after that read; only they can still fill the new holes.
        """
        known = bisect_right(ids, self._position)
        if question.firsts:
            self._answer(question, ids[:known], is_past_gaps=known < len(ids))
        for first, last in _holes(ids[known:], self._position):
            self._opened[first] = last
            self._due.setdefault(holders, _Ranges()).add(first, last)
        if known < len(ids):
            self._position = ids[-1]

    def delta(self, max_dead: int) -> PositionDelta:
        """What changed since the last delta.

        Of the gaps that died without a row at most so many are named; the others come later,
        which is harmless: until then they are merely read once more after a restart.
        """
        dead = self._dead[:max_dead]
        del self._dead[:max_dead]
        delta = PositionDelta(self._position, [*self._closed, *dead], list(self._opened.items()))
        self._opened = {}
        self._closed = []
        return delta

    def _answer(self, question: GapQuestion, ids: Sequence[int], *, is_past_gaps: bool) -> None:
        """Settle the due gaps that were read: up to the last row, or all where none is missing."""
        if is_past_gaps or not ids:
            read_through = MAX_ID if question.is_complete else question.lasts[-1]
        else:
            read_through = ids[-1]
        if not ids and len(question.holders) == 1:
            self._due[question.holders[0]].take(len(question.firsts))
            self._keep_or_close(question.firsts, question.lasts, question.holders[0])
        else:
            self._answer_each(question, ids, read_through)
        self._due = {holders: ranges for holders, ranges in self._due.items() if len(ranges)}

    def _answer_each(self, question: GapQuestion, ids: Sequence[int], read_through: int) -> None:
        at = 0
        all_holders = itertools.cycle(question.holders)
        for first, last, holders in zip(question.firsts, question.lasts, all_holders, strict=False):
            if first > read_through:
                break
            self._due[holders].take(1)
            end = min(last, read_through)
            until = bisect_right(ids, end, at)
            if until == at:
                self._keep_or_close((first,), (last,), holders)
                continue
            self._close(first)
            pieces = list(_holes(ids[at:until], first - 1))
            if ids[until - 1] < end:
                pieces.append((ids[until - 1] + 1, end))
            at = until
            if holders:
                for piece in pieces:
                    self._opened[piece[0]] = piece[1]
                    self._resting.setdefault(holders, _Ranges()).add(*piece)
            if end < last:
                self._opened[end + 1] = last
                self._due[holders].put_back_first(end + 1, last)

    def _keep_or_close(self, firsts: Sequence[int], lasts: Sequence[int], holders: Holders) -> None:
        """Gaps that were read and have no row: without holders they never will have one."""
        if holders:
            self._resting.setdefault(holders, _Ranges()).extend(firsts, lasts)
            return
        if self._opened:
            firsts = [first for first in firsts if self._opened.pop(first, None) is None]
        self._dead.extend(firsts)

    def _close(self, first: int) -> None:
        if self._opened.pop(first, None) is None:
            self._closed.append(first)


def _holes(ids: Sequence[int], before: int) -> Iterable[tuple[int, int]]:
    """The ranges that are missing between ``before`` and each of these ids."""
    if not ids or ids[-1] - before == len(ids):
        return
    for id_ in ids:
        if id_ - before > 1:
            yield before + 1, id_ - 1
        before = id_
