"""The keys of the ``source`` object of a forward pipeline."""

from __future__ import annotations

import msgspec


class OutboxSourceOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which outbox is read, and by whom.

    type: `outbox`; may be left out.
    outbox: The table, or the outbox table, as it was named when the pipeline was set.
    outbox_table: The outbox that this meant then. The catalog says it; it is read whatever is
        called so now.
    consumer_group: Every relay reads the outbox, with `parallelism` workers each, and each row
        goes to one of them. The group belongs to this pipeline alone. Without it one relay reads,
        in order.
    """

    type: str = "outbox"
    outbox: str
    outbox_table: str | None = None
    consumer_group: str | None = None
