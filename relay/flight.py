"""Tracks one publish: pending, in flight, settled.

For sinks that have several messages in flight at a time and get an answer for each.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

from relay.contracts import Failure
from relay.errors import ErrorKind, RelayError
from relay.message import RelayMessage

# States of a message, one byte each.
_PENDING = 0
_IN_FLIGHT = 1
_SETTLED = 2


class Flight:
    """The messages of one publish, from pending to settled.

    Messages are sent in order, except that with ``is_strict`` a message waits while another of its
    key is unsettled. ``window`` messages may be in flight, and ``window_bytes`` bytes and the one
    message that reaches them. After the first transient failure nothing more is sent, and what was
    not sent fails for the same reason. Settling a message frees at most one that waited for it: a
    sender that takes one more after each settled one leaves none behind.
    """

    def __init__(
        self,
        messages: Sequence[RelayMessage],
        *,
        is_strict: bool,
        window: int,
        window_bytes: int = 32 * 1024 * 1024,
    ) -> None:
        self.messages = messages
        self.duplicates = 0
        self.bytes_in_flight = 0
        self._states = bytearray(len(messages))
        self._sizes = [0] * len(messages)
        self._count_in_flight = 0
        self._window = window
        self._window_bytes = window_bytes
        self._next = 0
        self._freed: deque[int] = deque()
        # Only a key that comes more than once has an order to keep.
        self._ordered_keys = _repeated_keys(messages) if is_strict else frozenset()
        # Of these, the ones that have a message in flight, each with those that wait for it.
        self._behind: dict[str, deque[int]] = {}
        self._errors: dict[int, RelayError] = {}
        self._stopped_by: RelayError | None = None

    @property
    def is_over(self) -> bool:
        """True when nothing is in flight and nothing more will be sent."""
        return not self._count_in_flight and (self._stopped_by is not None or not self._has_more)

    def in_flight(self) -> list[int]:
        """What was sent and is not settled, in order."""
        return [index for index, state in enumerate(self._states) if state == _IN_FLIGHT]

    def is_in_flight(self, index: int) -> bool:
        """True for what was sent and is not settled; any number may be asked for."""
        return 0 <= index < len(self._states) and self._states[index] == _IN_FLIGHT

    def take(self) -> int | None:
        """The next message that may be sent now, counted as in flight; None for none."""
        if self._stopped_by is not None or self._is_full:
            return None
        index = self._freed.popleft() if self._freed else self._next_with_free_key()
        if index is None:
            return None
        self._states[index] = _IN_FLIGHT
        self._count_in_flight += 1
        return index

    def take_chunk(self, most: int, most_bytes: int) -> Sequence[int]:
        """The next messages that may be sent now: at most so many, of about so many bytes."""
        size = 0
        if not self._freed and not self._ordered_keys:
            if self._stopped_by is not None or self._is_full:
                return ()
            # Nobody waits for anybody: the next ones as they stand.
            first = end = self._next
            room = min(most, self._window - self._count_in_flight)
            for message in self.messages[first : first + room]:
                end += 1
                size += len(message.payload)
                if size >= most_bytes:
                    break
            self._next = end
            self._states[first:end] = bytes((_IN_FLIGHT,)) * (end - first)
            self._count_in_flight += end - first
            return range(first, end)
        taken: list[int] = []
        while len(taken) < most and size < most_bytes and (index := self.take()) is not None:
            taken.append(index)
            size += len(self.messages[index].payload)
        return taken

    def put_back(self, indices: Sequence[int]) -> None:
        """These were taken, last of all, and were not sent after all: they are the next ones."""
        for index in indices:
            self._states[index] = _PENDING
        self._count_in_flight -= len(indices)
        if indices and not self._ordered_keys and indices[0] == self._next - len(indices):
            self._next = indices[0]
        else:
            self._freed.extendleft(reversed(indices))

    def weigh(self, index: int, size_bytes: int) -> None:
        """Note how large a message in flight is."""
        self._sizes[index] = size_bytes
        self.bytes_in_flight += size_bytes

    def accept(self, indices: Iterable[int]) -> None:
        """Of these, all that are in flight are durable; any number may be among them."""
        self._settle(indices)

    def fail(self, index: int, error: RelayError) -> None:
        """The message was not accepted."""
        if error.kind is not ErrorKind.MESSAGE and self._stopped_by is None:
            self._stopped_by = error
        if self._settle((index,)):
            self._errors[index] = error

    def fail_all(self, error: RelayError) -> None:
        """Nothing more will be answered of what is in flight."""
        if self._stopped_by is None:
            self._stopped_by = error
        for index in self.in_flight():
            self.fail(index, error)

    def failures(self) -> list[Failure]:
        """Every message that is not durable, in order, with its reason; once the flight is over."""
        found = [Failure(index, error) for index, error in self._errors.items()]
        if self._stopped_by is not None:
            unsent = [*self._freed, *range(self._next, len(self.messages))]
            unsent.extend(index for behind in self._behind.values() for index in behind)
            found += [Failure(index, self._stopped_by, was_sent=False) for index in unsent]
        return sorted(found, key=lambda failure: failure.index)

    @property
    def _is_full(self) -> bool:
        return self._count_in_flight >= self._window or self.bytes_in_flight >= self._window_bytes

    @property
    def _has_more(self) -> bool:
        return bool(self._freed) or self._next < len(self.messages)

    def _next_with_free_key(self) -> int | None:
        while self._next < len(self.messages):
            index = self._next
            self._next += 1
            key = self.messages[index].key
            if key is None or key not in self._ordered_keys:
                return index
            behind = self._behind.get(key)
            if behind is None:
                self._behind[key] = deque()
                return index
            behind.append(index)
        return None

    def _settle(self, indices: Iterable[int]) -> int:
        """Settle those that are in flight; how many that were."""
        states, sizes, ordered_keys = self._states, self._sizes, self._ordered_keys
        count = len(states)
        settled_now = size = 0
        for index in indices:
            if not 0 <= index < count or states[index] != _IN_FLIGHT:
                continue
            states[index] = _SETTLED
            settled_now += 1
            size += sizes[index]
            if ordered_keys:
                key = self.messages[index].key
                if key is not None and key in ordered_keys:
                    self._free(key)
        self.bytes_in_flight -= size
        self._count_in_flight -= settled_now
        return settled_now

    def _free(self, key: str) -> None:
        behind = self._behind[key]
        if behind:
            self._freed.append(behind.popleft())
        else:
            del self._behind[key]


def _repeated_keys(messages: Sequence[RelayMessage]) -> AbstractSet[str]:
    keys = [message.key for message in messages]
    if len(set(keys)) == len(keys):
        return frozenset()
    return {key for key, count in Counter(keys).items() if count > 1 and key is not None}
