"""Tracks one publish in batches, several of which are in flight at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from relay.errors import ErrorKind, RelayError

MOST_ENTRIES = 10


class Flight:
    """The messages of one publish, by their numbers, from pending to settled.

    ``groups`` are their message groups, None for one that nothing has to wait for; ``sizes`` their
    bytes. A batch has at most ten messages and ``batch_bytes``, unless one alone is larger. A
    message waits while another of its group is in a batch in flight. The same batch may
    hold several of a group, in order, but only one of a key: ``keys``, None for one that may
    stand beside its like. After the first transient failure nothing more is taken.
    """

    def __init__(
        self,
        groups: Sequence[str | None],
        sizes: Sequence[int],
        *,
        keys: Sequence[str | None],
        batch_bytes: int,
    ) -> None:
        self.errors: dict[int, RelayError] = {}
        # Those of the failed that only waited behind the first transient failure.
        self.unsent: set[int] = set()
        self._groups = groups
        self._sizes = sizes
        self._keys = keys
        self._batch_bytes = batch_bytes
        self._stopped_by: RelayError | None = None
        self._ready: deque[int] = deque()
        # Groups of which a message is ready or in flight, each with those that wait for it.
        self._behind: dict[str, deque[int]] = {}
        for number, group in enumerate(groups):
            if group is None:
                self._ready.append(number)
            elif group in self._behind:
                self._behind[group].append(number)
            else:
                self._behind[group] = deque()
                self._ready.append(number)

    def take(self) -> list[int]:
        """The next batch that may be sent now; none for none."""
        batch: list[int] = []
        if self._stopped_by is not None:
            return batch
        left = self._batch_bytes
        while self._ready and len(batch) < MOST_ENTRIES:
            if batch and self._sizes[self._ready[0]] > left:
                break
            left -= self._take_group(self._ready.popleft(), batch, left)
        return batch

    def settle(self, batch: Sequence[int], errors: Mapping[int, RelayError]) -> None:
        """A batch that was taken is answered: these of its messages failed."""
        freed: list[int] = []
        for number in batch:
            error = errors.get(number)
            if error is not None:
                self.errors[number] = error
                if error.kind is not ErrorKind.MESSAGE and self._stopped_by is None:
                    self._stopped_by = error
        for group in dict.fromkeys(self._groups[number] for number in batch):
            if group is None:
                continue
            if self._behind[group]:
                freed.append(self._behind[group].popleft())
            else:
                del self._behind[group]
        # What waited has waited longest: it goes first, or a busy group would finish last.
        self._ready.extendleft(reversed(freed))

    def fail_unsent(self) -> None:
        """Once all that was taken is settled: the rest fails with the first transient failure."""
        if self._stopped_by is None:
            return
        for number in (*self._ready, *(one for behind in self._behind.values() for one in behind)):
            self.errors[number] = self._stopped_by
            self.unsent.add(number)

    def _take_group(self, number: int, batch: list[int], left: int) -> int:
        """Add this message, and what may follow it of those behind; their bytes."""
        batch.append(number)
        taken = self._sizes[number]
        group = self._groups[number]
        if group is None:
            return taken
        behind = self._behind[group]
        keys = {self._keys[number]} - {None}
        while behind and len(batch) < MOST_ENTRIES:
            size, key = self._sizes[behind[0]], self._keys[behind[0]]
            if taken + size > left or key in keys:
                break
            if key is not None:
                keys.add(key)
            batch.append(behind.popleft())
            taken += size
        return taken
