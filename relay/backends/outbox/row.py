"""Outbox rows as they are read: column by column, which is how a driver gives many rows quickly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Self, TypeVar

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

_Value = TypeVar("_Value")

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
        if not rows:
            return cls()
        ids, refresh_ids, created_ats, inserted, deleted, claims, payloads, headers, keys = zip(
            *rows, strict=True
        )
        return cls(
            ids=ids,
            refresh_ids=refresh_ids,
            created_ats=created_ats,
            inserted_counts=inserted,
            deleted_counts=deleted,
            are_claim_checks=claims,
            payloads=payloads,
            headers=headers,
            key_columns=keys,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[OutboxRow]:
        return zip(
            self.ids,
            self._whole(self.refresh_ids),
            self._whole(self.created_ats),
            self._whole(self.inserted_counts),
            self._whole(self.deleted_counts),
            self._whole(self.are_claim_checks),
            self._whole(self._all_payloads()),
            self._whole(self.headers),
            self._whole(self.key_columns),
            strict=True,
        )

    def part(self, start: int, end: int) -> Self:
        """The rows from ``start`` to before ``end``."""
        return type(self)(
            ids=self.ids[start:end],
            refresh_ids=self.refresh_ids[start:end],
            created_ats=self.created_ats[start:end],
            inserted_counts=self.inserted_counts[start:end],
            deleted_counts=self.deleted_counts[start:end],
            are_claim_checks=self.are_claim_checks[start:end],
            payloads=self.payloads[start:end],
            inserted=self.inserted[start:end],
            headers=self.headers[start:end],
            key_columns=self.key_columns[start:end],
        )

    def cut(self) -> Sequence[bytes]:
        """What `cut_inserted` makes of the payloads."""
        if self.inserted or None in self.payloads:
            return self.inserted
        return cut_inserted(b"\n".join(filter(None, self.payloads)), len(self))

    def _all_payloads(self) -> Sequence[bytes | None]:
        if not self.inserted:
            return self.payloads
        return [_BEFORE_INSERTED + rows + _BEHIND_INSERTED for rows in self.inserted]

    def _whole(self, column: Sequence[_Value | None]) -> Sequence[_Value | None]:
        return column or (None,) * len(self.ids)


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
