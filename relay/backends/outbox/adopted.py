"""Rows of an outbox that is a table of its application: each is one message, as it was written.

The payload goes out byte by byte, whether or not it is JSON: who has to look into it finds out. The
fields are those that `adopt_outbox` was told: key, deduplication key, event type, subject, and a
digest of all of them and of the outbox.
"""

from __future__ import annotations

from relay.backends.outbox.decoder import Decoded, OutboxDecoder, headers_of, history_of
from relay.backends.outbox.row import OutboxRow, OutboxRows
from relay.message import NO_HEADERS, RelayMessage


class AdoptedDecoder(OutboxDecoder):
    """Decodes the rows of an adopted outbox. Without state, as `OutboxDecoder`.

    A row without a deduplication key of its own has one of outbox, id and digest: an id that is
    drawn again for another event, after a restore, gives another key. Event type and subject are
    headers of these names.
    """

    def decode(self, rows: OutboxRows, decoded: Decoded) -> bool:
        """Decode these behind what is decoded already; always True, all belong into the batch."""
        own = self._own(rows, [fields[0] if fields else None for *_, fields in rows])
        decoded.messages += self._shaped([self._message_of(row) for row in own], decoded)
        decoded.rows += len(rows)
        return True

    def _message_of(self, row: OutboxRow) -> RelayMessage:
        outbox_id, _, created_at, _, _, _, payload, headers, fields = row
        key, dedup_key, event_type, subject, digest = fields or (None,) * 5
        said = dict(NO_HEADERS if headers is None else headers_of(headers))
        if event_type is not None:
            said["event_type"] = event_type
        if subject is not None:
            said["subject"] = subject
        return RelayMessage(
            dedup_key=f"{self._namespace}{dedup_key}"
            if dedup_key
            else f"{self._prefix}{outbox_id}:0{history_of(digest)}",
            payload=b"null" if payload is None else payload,
            key=key,
            stream_table=self._stream_table,
            outbox_id=outbox_id,
            created_at=created_at,
            headers=said,
        )
