"""Outbox rows as they are read: column by column, which is how a driver gives many rows quickly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Self, TypeVar

import msgspec

# id, refresh_id, created_at, inserted_count, deleted_count, is_claim_check, payload, headers
OutboxRow = tuple[
    int,
    str | None,
    datetime | None,
    int | None,
    int | None,
    bool | None,
    bytes | None,
    bytes | None,
]

_Value = TypeVar("_Value")


class OutboxRows(msgspec.Struct, frozen=True, kw_only=True):
    """Rows in ascending order of id; all columns have the same length.

    A column without a single value is empty. ``payloads``: JSON texts of type jsonb.
    """

    ids: Sequence[int] = ()
    refresh_ids: Sequence[str | None] = ()
    created_ats: Sequence[datetime | None] = ()
    inserted_counts: Sequence[int | None] = ()
    deleted_counts: Sequence[int | None] = ()
    are_claim_checks: Sequence[bool | None] = ()
    payloads: Sequence[bytes | None] = ()
    headers: Sequence[bytes | None] = ()

    @classmethod
    def of(cls, rows: Sequence[OutboxRow]) -> Self:
        """The same rows from rows."""
        if not rows:
            return cls()
        ids, refresh_ids, created_ats, inserted, deleted, claims, payloads, headers = zip(
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
            self._whole(self.payloads),
            self._whole(self.headers),
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
            headers=self.headers[start:end],
        )

    def _whole(self, column: Sequence[_Value | None]) -> Sequence[_Value | None]:
        return column or (None,) * len(self.ids)
