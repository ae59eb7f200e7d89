"""The state of this relay, folded from its events once: `PipelineStats` for each pipeline.

Metrics, health, `/status`, the status view and the fleet read it; `Board.snapshot` gives it frozen.
Here, once, stands what counts as well, as stalled, as delivered and as gone.

Well: the database is connected and no pipeline is suspended, failed, stalled, in trouble for longer
than a short grace, or left with nothing but dead letters or refused requests. Trouble begins with a
failure and ends with *progress*: a batch acknowledged, or a poll that found nothing while the
pipeline runs and nothing is in flight. So a connection that comes and goes without moving anything
does not look well in between.

Stalled: for ``stalled_after_s`` there was something to do and no progress. There is something to
do while messages are in flight, while the outbox is ahead, while the pipeline starts, and while no
poll returns (a source answers within a second or so, even if it has nothing).
"""

from __future__ import annotations

from relay.board.board import Board
from relay.board.stats import RECENT_BATCHES, PipelineStats
from relay.board.status import Latency, PipelineStatus, RecentBatch, RelayStatus
from relay.board.window import RATE_SECONDS, Histogram

__all__ = [
    "RATE_SECONDS",
    "RECENT_BATCHES",
    "Board",
    "Histogram",
    "Latency",
    "PipelineStats",
    "PipelineStatus",
    "RecentBatch",
    "RelayStatus",
]
