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
        self._sizes = sizes
        self._keys = keys
        self._batch_bytes = batch_bytes
        self._stopped_by: RelayError | None = None
        lanes: dict[str | int, deque[int]] = {}
        for number, group in enumerate(groups):
            lanes.setdefault(number if group is None else group, deque()).append(number)
        self._lanes = list(lanes.values())
        self._ready = deque(self._lanes)
        # By the first message of a batch in flight, the lanes that wait for it.
        self._waiting: dict[int, list[deque[int]]] = {}

    def take(self) -> list[int]:
        """The next batch that may be sent now; none for none."""
        batch: list[int] = []
        lanes: list[deque[int]] = []
        left = self._batch_bytes
        while self._stopped_by is None and self._ready and len(batch) < MOST_ENTRIES:
            lane, keys = self._ready[0], set[str]()
            if batch and self._sizes[lane[0]] > left:
                break
            lanes.append(self._ready.popleft())
            while lane and len(batch) < MOST_ENTRIES:
                size, key = self._sizes[lane[0]], self._keys[lane[0]]
                if batch and (size > left or key in keys):
                    break
                if key is not None:
                    keys.add(key)
                batch.append(lane.popleft())
                left -= size
        if batch:
            self._waiting[batch[0]] = lanes
        return batch

    def settle(self, batch: Sequence[int], errors: Mapping[int, RelayError]) -> None:
        """A batch that was taken is answered: these of its messages failed."""
        for number, error in errors.items():
            self.errors[number] = error
            if error.kind is not ErrorKind.MESSAGE:
                self._stopped_by = self._stopped_by or error
        # What waited has waited longest: it goes first, or a busy group would finish last.
        self._ready.extendleft(reversed([lane for lane in self._waiting.pop(batch[0]) if lane]))

    def fail_unsent(self) -> None:
        """Once all that was taken is settled: the rest fails with the first transient failure."""
        if self._stopped_by is not None:
            self.unsent.update(*self._lanes)
            self.errors |= dict.fromkeys(self.unsent, self._stopped_by)
