"""Which pipelines there are to be shown."""

from __future__ import annotations

from collections.abc import Sequence

from relay.events import Event, OwnershipChanged, PipelineDescribed, PipelineState, StateChanged

AT_REST = frozenset({PipelineState.STOPPED, PipelineState.COMPLETED})

_BEGINNINGS = frozenset({PipelineState.STARTING, PipelineState.FAILED})


class Membership:
    """Which pipelines an observer has to show; every observer that shows pipelines keeps one.

    A pipeline comes with its description or with its first state, and goes when the relay owns it
    no longer. What it says afterwards, while its connections close, does not bring it back.
    """

    def __init__(self) -> None:
        self._present: set[str] = set()
        self._owned: frozenset[str] | None = None

    def __contains__(self, pipeline: str) -> bool:
        return pipeline in self._present

    def observe(self, event: Event) -> Sequence[str]:
        """Take the event into account; gives the pipelines that are gone with it."""
        match event:
            case OwnershipChanged():
                self._owned = frozenset(event.pipelines)
                gone = self._present - self._owned
            case StateChanged() if event.state in AT_REST and self._owned is not None:
                gone = (self._present - self._owned) & {event.pipeline}
            case PipelineDescribed():
                self._present.add(event.pipeline)
                return ()
            case StateChanged() if event.state in _BEGINNINGS:
                self._present.add(event.pipeline)
                return ()
            case _:
                return ()
        self._present -= gone
        return sorted(gone)
