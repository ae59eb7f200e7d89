"""The keys of the ``source`` object of a forward pipeline."""

from __future__ import annotations

import msgspec


class OutboxSourceOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which outbox is read, and by whom.

    type: `outbox`; may be left out.
    outbox: The table, or the outbox table, as it was named when the pipeline was set.
    outbox_table: The outbox that this meant then. The catalog says it; it is read whatever is
        called so now.
    consumer_group: Null for a reader of its own. Not available in this version: the catalog accepts
        a group, and the relay refuses to run the pipeline.
    """

    type: str = "outbox"
    outbox: str
    outbox_table: str | None = None
    consumer_group: str | None = None
