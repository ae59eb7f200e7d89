"""What one pipeline emits to its observers (`relay.events`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TypedDict

from relay.cancellation import reraise_cancellation
from relay.contracts import Describing, Sink, Source
from relay.errors import RelayError
from relay.events import (
    ConnectionChanged,
    Direction,
    Event,
    PipelineState,
    Retried,
    Side,
    StateChanged,
)

_DESCRIBE_TIMEOUT_S = 2.0
_STOPPING = (PipelineState.STOPPING, "")
_ENDS = frozenset({PipelineState.STOPPED, PipelineState.COMPLETED, PipelineState.FAILED})


class Labels(TypedDict):
    """Whose event it is."""

    pipeline: str
    direction: Direction


class PipelineEvents:
    """Emits this pipeline's events; skips repeated states. ``labels`` are part of every event."""

    def __init__(self, pipeline: str, direction: Direction, emit: Callable[[Event], None]) -> None:
        self.labels: Labels = {"pipeline": pipeline, "direction": direction}
        self.emit = emit
        self._state: tuple[PipelineState, str] | None = None

    def state(self, state: PipelineState, reason: str = "") -> None:
        """Emit the state, unless it was the last one; while stopping, only how it ends."""
        if self._state == (state, reason):
            return
        if self._state == _STOPPING and state not in _ENDS:
            return
        self._state = (state, reason)
        self.emit(StateChanged(**self.labels, state=state, reason=reason))

    async def connected(self, name: Side, side: Source | Sink) -> None:
        """Emit that this side is connected, with what it says of its broker."""
        details = await _described(side)
        self.emit(ConnectionChanged(**self.labels, side=name, is_connected=True, details=details))

    def disconnected(self, name: Side) -> None:
        """Emit that this side has lost or closed its connection."""
        self.emit(ConnectionChanged(**self.labels, side=name, is_connected=False))

    def retried(self, name: Side, attempt: int, delay_s: float, error: RelayError) -> None:
        """Emit that something failed and will be tried again."""
        self.state(PipelineState.RETRYING, str(error))
        self.emit(
            Retried(
                **self.labels,
                side=name,
                attempt=attempt,
                delay_s=delay_s,
                kind=error.kind,
                error=str(error),
            )
        )


async def _described(side: Source | Sink) -> Mapping[str, str]:
    """Nothing where it can't say now: it is connected all the same."""
    if not isinstance(side, Describing):
        return {}
    try:
        async with asyncio.timeout(_DESCRIBE_TIMEOUT_S):
            return await side.describe()
    except (RelayError, TimeoutError) as error:
        reraise_cancellation(error)
        return {}
