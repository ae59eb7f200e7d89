"""The board itself: it listens, and gives snapshots."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from relay import __version__
from relay.board.picture import Picture
from relay.board.roster import Roster
from relay.board.status import RelayStatus
from relay.events import Event, OwnershipChanged, PipelineEvent


class Board:
    """An observer that keeps the picture; ask it for a `snapshot` in the event loop's thread.

    ``mask`` takes secrets out of error texts. ``clock`` is monotonic and in seconds, ``now`` the
    time of day with zone: a clock that jumps changes what is shown, never what is judged.
    """

    def __init__(
        self,
        *,
        worker_id: str,
        group_id: str,
        stalled_after_s: float,
        mask: Callable[[str], str],
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._worker_id = worker_id
        self._group_id = group_id
        self._stalled_after_s = stalled_after_s
        self._mask = mask
        self._clock = clock
        self._now = now
        self._started_at = now()
        self._is_database_connected = False
        self._database_reason = ""
        self._is_coordinated = False
        self._members = 0
        self._roster = Roster()
        self._pictures: dict[str, Picture] = {}

    def __call__(self, event: Event) -> None:
        """Take one event into the picture."""
        for name in self._roster.observe(event):
            del self._pictures[name]
        if isinstance(event, PipelineEvent):
            if event.pipeline in self._roster:
                self._picture(event).observe(event, self._clock())
        elif isinstance(event, OwnershipChanged):
            self._is_coordinated = True
            self._members = event.members
        else:
            self._is_database_connected = event.is_connected
            self._database_reason = self._mask(event.reason)

    def snapshot(self) -> RelayStatus:
        """The picture now."""
        clock_s, now = self._clock(), self._now()
        return RelayStatus(
            worker_id=self._worker_id,
            group_id=self._group_id,
            version=__version__,
            started_at=self._started_at,
            taken_at=now,
            database_connected=self._is_database_connected,
            database_reason=self._database_reason,
            is_coordinated=self._is_coordinated,
            members=self._members,
            pipelines=[
                self._pictures[name].status(clock_s, now, self._stalled_after_s)
                for name in sorted(self._pictures)
            ],
        )

    def stalled(self) -> Mapping[str, bool]:
        """For each pipeline whether it is stalled now; much cheaper than a snapshot."""
        clock_s = self._clock()
        return {
            name: picture.is_stalled(clock_s, self._stalled_after_s)
            for name, picture in self._pictures.items()
        }

    def _picture(self, event: PipelineEvent) -> Picture:
        picture = self._pictures.get(event.pipeline)
        if picture is None:
            picture = Picture(event.pipeline, event.direction, self._mask, self._clock())
            self._pictures[event.pipeline] = picture
        return picture
