"""Outbox rows as they are read: column by column, which is how a driver gives many rows quickly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Self

import msgspec

# id, refresh_id, created_at, inserted_count, deleted_count, is_claim_check, payload, headers,
# key_columns
OutboxRow = tuple[
    int,
    str | None,
    datetime | None,
    int | None,
    int | None,
    bool | None,
    bytes | None,
    bytes | None,
    Sequence[str] | None,
]

# The columns of `OutboxRows` in the order of a row.
_COLUMNS = (
    "ids", "refresh_ids", "created_ats", "inserted_counts", "deleted_counts", "are_claim_checks",
    "payloads", "headers", "key_columns",
)  # fmt: skip

# How jsonb writes what stands around the rows of the commonest payload by far. It puts shorter
# names first, so nothing else can stand in front, and what stood behind would not end like this.
_BEFORE_INSERTED = b'{"v": 1, "deleted": [], "inserted": ['
_BEHIND_INSERTED = b"]}"
_BETWEEN_INSERTED = _BEHIND_INSERTED + b"\n" + _BEFORE_INSERTED


class OutboxRows(msgspec.Struct, frozen=True, kw_only=True):
    """Rows in ascending order of id; all columns have the same length.

    A column without a single value is empty. ``payloads``: JSON texts of type jsonb; ``inserted``
    stands for them where all could be cut (`cut_inserted`). ``key_columns``: for rows whose key was
    renamed since the outbox was enabled.
    """

    ids: Sequence[int] = ()
    refresh_ids: Sequence[str | None] = ()
    created_ats: Sequence[datetime | None] = ()
    inserted_counts: Sequence[int | None] = ()
    deleted_counts: Sequence[int | None] = ()
    are_claim_checks: Sequence[bool | None] = ()
    payloads: Sequence[bytes | None] = ()
    inserted: Sequence[bytes] = ()
    headers: Sequence[bytes | None] = ()
    key_columns: Sequence[Sequence[str] | None] = ()

    @classmethod
    def of(cls, rows: Sequence[OutboxRow]) -> Self:
        """The same rows from rows."""
        return cls(**dict(zip(_COLUMNS, zip(*rows, strict=True), strict=True))) if rows else cls()

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[OutboxRow]:
        nothing = (None,) * len(self.ids)
        columns = [getattr(self, name) or nothing for name in _COLUMNS]
        if self.inserted:
            columns[_COLUMNS.index("payloads")] = [
                _BEFORE_INSERTED + rows + _BEHIND_INSERTED for rows in self.inserted
            ]
        return zip(*columns, strict=True)

    def part(self, start: int, end: int) -> Self:
        """The rows from ``start`` to before ``end``."""
        names = self.__struct_fields__
        return type(self)(**{name: getattr(self, name)[start:end] for name in names})

    def cut(self) -> Sequence[bytes]:
        """What `cut_inserted` makes of the payloads."""
        if self.inserted or None in self.payloads:
            return self.inserted
        return cut_inserted(b"\n".join(filter(None, self.payloads)), len(self))


def cut_inserted(payloads: bytes, count: int) -> Sequence[bytes]:
    """What was inserted by each of so many payloads, one a line; none where one is of another kind.

    Each begins and ends as a payload that tells of inserted rows and of nothing else. Whether what
    stands between is one row is for the caller to find out.
    """
    if not payloads.startswith(_BEFORE_INSERTED) or not payloads.endswith(_BEHIND_INSERTED):
        return ()
    # No JSON text of type jsonb has a line break in it: this one is between two payloads.
    between = payloads[len(_BEFORE_INSERTED) : -len(_BEHIND_INSERTED)].split(_BETWEEN_INSERTED)
    return between if len(between) == count else ()
