"""Inbox tables in PostgreSQL, the relay's own database or another.

Guarantees: a batch is one statement and one transaction; what counts as accepted is committed and
flushed to disk, also where ``synchronous_commit`` is off. A row that PostgreSQL refuses is found
by bisecting; its neighbours are written.
Order: rows of a batch are inserted in the order given, batch after batch, which costs nothing
here; ``received_at`` is the transaction's time and equal within a batch.
Deduplication: ``on conflict do nothing`` on the event id, so a repeated message is accepted, not
written again, and counted.
Rights: an inbox of the catalog is written by the function beside its table, which runs as the
table's owner, so that triggers, policies and checks of others never run with the relay's rights. A
table named directly takes INSERT on the written columns and SELECT on the event id.
What it does not do: update a row that is there, or wait for whoever processes the inbox.

Read `options` first, then `row` (a message as values), `table` (where they go), `sink`.
"""

from __future__ import annotations

from relay.backends.inbox.sink import InboxSink

__all__ = ["InboxSink"]
