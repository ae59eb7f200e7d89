"""The keys of the ``source`` object of a forward pipeline."""

from __future__ import annotations

import msgspec


class OutboxSourceOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which outbox is read, and by whom.

    type: `outbox`; may be left out.
    outbox: The table, or the outbox table.
    consumer_group: Null for a reader of its own. Not available in this version: the catalog accepts
        a group, and the relay refuses to run the pipeline.
    """

    type: str = "outbox"
    outbox: str
    consumer_group: str | None = None
