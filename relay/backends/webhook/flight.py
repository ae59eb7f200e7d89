"""The bookkeeping of messages that are sent one by one, several at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from relay.errors import ErrorKind, RelayError


class Flight:
    """The messages of one publish, by their numbers, from waiting to settled.

    ``keys`` are their entities. Messages are taken in order, except that with ``is_strict`` one
    waits while another of its key is unsettled. The first failure that is not the fault of its own
    message grounds the flight: nothing more is taken. Landing frees at most one message, so a
    sender that takes again after each landing leaves none behind.
    """

    def __init__(self, keys: Sequence[str | None], *, is_strict: bool) -> None:
        self.errors: dict[int, RelayError] = {}
        self._keys = keys
        self._is_strict = is_strict
        self._next = 0
        self._freed: deque[int] = deque()
        # Keys that have a message under way, each with those that wait for it.
        self._behind: dict[str, deque[int]] = {}
        self._grounded: RelayError | None = None

    def take(self) -> int | None:
        """The next message that may be sent now; None for none."""
        if self._grounded is not None:
            return None
        if self._freed:
            return self._freed.popleft()
        while self._next < len(self._keys):
            index = self._next
            self._next += 1
            key = self._keys[index]
            if not self._is_strict or key is None:
                return index
            if key not in self._behind:
                self._behind[key] = deque()
                return index
            self._behind[key].append(index)
        return None

    def land(self, index: int, error: RelayError | None) -> None:
        """A message that was taken is accepted, or failed."""
        if error is not None:
            self.errors[index] = error
            if error.kind is not ErrorKind.MESSAGE and self._grounded is None:
                self._grounded = error
        key = self._keys[index]
        if not self._is_strict or key is None:
            return
        if self._behind[key]:
            self._freed.append(self._behind[key].popleft())
        else:
            del self._behind[key]

    def fail_unsent(self) -> None:
        """Once all that was taken has landed: what was not taken fails as what grounded it."""
        if self._grounded is None:
            return
        unsent = [*self._freed, *range(self._next, len(self._keys))]
        unsent.extend(index for behind in self._behind.values() for index in behind)
        for index in unsent:
            self.errors[index] = self._grounded
