"""The keys of the ``source`` object of a forward pipeline."""

from __future__ import annotations

from typing import Annotated

import msgspec

from relay.options import Key


class OutboxSourceOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which outbox is read, and by whom."""

    type: Annotated[str, Key("`outbox`; may be left out.")] = "outbox"
    outbox: Annotated[str, Key("The table, or the outbox table.")]
    consumer_group: Annotated[
        str | None,
        Key(
            "Null for a reader of its own. Not available in this version: the catalog accepts a"
            " group, and the relay refuses to run the pipeline."
        ),
    ] = None
