"""The board itself: it listens, and gives snapshots."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from relay import __version__
from relay.board.stats import AT_REST, PipelineStats
from relay.board.status import RelayStatus
from relay.events import (
    CatalogObserved,
    Event,
    OwnershipChanged,
    PipelineDescribed,
    PipelineEvent,
    PipelineState,
    StateChanged,
)

# Between two owners, and at a start, a pipeline has none for some seconds.
_UNOWNED_GRACE_S = 15.0
# An event of this state is the first of a pipeline.
_BEGINNINGS = frozenset({PipelineState.STARTING, PipelineState.FAILED})


class Board:
    """An observer that keeps `PipelineStats`; ask it for a `snapshot` in the event loop's thread.

    A pipeline comes with its description or with its first state, and goes when the relay owns it
    no longer. What it says afterwards, while its connections close, does not bring it back.

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
        self._database_reason = ""
        self._owned: frozenset[str] | None = None
        self._delivered_before: Counter[str] = Counter()
        self.pipelines: dict[str, PipelineStats] = {}
        self.is_database_connected = False
        self._blocked: Mapping[str, str] = {}
        self.catalog = CatalogObserved(outboxes=[], unowned=[], idle=[])
        self._unowned_since_s: dict[str, float] = {}
        self.owned = 0
        self.members = 0

    def __call__(self, event: Event) -> None:
        """Take one event into account."""
        if isinstance(event, PipelineEvent):
            self._observe(event)
        elif isinstance(event, OwnershipChanged):
            self._owned = frozenset(event.pipelines)
            for name in self.pipelines.keys() - self._owned:
                self._forget(name)
            self.owned = len(event.pipelines) - len(event.everywhere)
            self.members = event.members
            self._blocked = event.blocked
        elif isinstance(event, CatalogObserved):
            self.catalog = event
            clock_s, before = self._clock(), self._unowned_since_s
            self._unowned_since_s = {name: before.get(name, clock_s) for name in event.unowned}
        else:
            self.is_database_connected = event.is_connected
            self._database_reason = self._mask(event.reason)

    def snapshot(self) -> RelayStatus:
        """Everything as it stands now."""
        return RelayStatus(
            worker_id=self._worker_id,
            group_id=self._group_id,
            version=__version__,
            started_at=self._started_at,
            taken_at=self._now(),
            database_connected=self.is_database_connected,
            database_reason=self._database_reason,
            is_coordinated=self._owned is not None,
            members=self.members,
            blocked=self._blocked,
            unowned=self._unowned(),
            paused={
                lag.pipeline: lag.lag_rows
                for lag in self.catalog.idle
                if lag.pipeline not in self.catalog.unowned and lag.pipeline not in self.pipelines
            },
            delivered_before=dict(self._delivered_before),
            pipelines=[self.pipelines[name].status() for name in sorted(self.pipelines)],
        )

    def _unowned(self) -> Sequence[str]:
        """What nobody has taken for a while, without what is known to be blocked."""
        too_early_s = self._clock() - _UNOWNED_GRACE_S
        return [
            name
            for name, since_s in self._unowned_since_s.items()
            if since_s <= too_early_s and name not in self._blocked and name not in self.pipelines
        ]

    def _observe(self, event: PipelineEvent) -> None:
        state = event.state if isinstance(event, StateChanged) else None
        is_known = event.pipeline in self.pipelines
        is_ours = self._owned is None or event.pipeline in self._owned
        if state in AT_REST and not is_ours:
            if is_known:
                self._forget(event.pipeline)
        elif is_known or state in _BEGINNINGS or isinstance(event, PipelineDescribed):
            self._stats(event).observe(event)

    def _stats(self, event: PipelineEvent) -> PipelineStats:
        """Those of the event's pipeline; fresh ones where it connects something else now."""
        stats = self.pipelines.get(event.pipeline)
        if isinstance(event, PipelineDescribed) and stats is not None and stats.source:
            labels = (event.direction, event.source, event.sink)
            if labels != (stats.direction, stats.source, stats.sink):
                self._forget(event.pipeline)
                stats = None
        if stats is None:
            stats = PipelineStats(
                name=event.pipeline,
                direction=event.direction,
                mask=self._mask,
                clock=self._clock,
                now=self._now,
                stalled_after_s=self._stalled_after_s,
                since_s=self._clock(),
            )
            self.pipelines[event.pipeline] = stats
        return stats

    def _forget(self, pipeline: str) -> None:
        self._delivered_before[pipeline] += self.pipelines.pop(pipeline).accepted
