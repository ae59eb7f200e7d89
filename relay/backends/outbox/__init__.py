"""The outbox source: events of an outbox table, none lost, in commit order per key."""

from __future__ import annotations

from relay.backends.outbox.source import OutboxSource

__all__ = ["OutboxSource"]
