"""Logs: one format, on standard error, without payloads and without secrets.

`configure` takes over the root logger. Every record becomes one `LogEntry` whose texts have gone
through the mask; the entry is kept for the status view and, unless that view has the
screen, over a bounded queue to a thread that writes. So a stalled terminal or a full pipe costs
lines, which are counted, and never holds up the relay.

`EventLog` turns events into records. It is where a failure that repeats is logged once and then
summed up.
"""

from __future__ import annotations

from relay.log.entry import FIELDS, LogEntry
from relay.log.event_log import EventLog
from relay.log.output import RING_ENTRIES, Logs, configure

__all__ = [
    "FIELDS",
    "RING_ENTRIES",
    "EventLog",
    "LogEntry",
    "Logs",
    "configure",
]
