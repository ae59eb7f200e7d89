"""Relays as a status view sees them: of this process, at an address, or all of the database."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from relay.board import Board, RelayStatus
from relay.catalog import Backfill, Catalog, DeadLetterSummary, Seek, readers_of
from relay.errors import ConfigurationError
from relay.overview import report_of
from relay.partition import pipeline_of
from relay.postgres import Database
from relay.remote import status_of
from relay.secrets import masked
from relay.status.fleet import LATEST_DEAD_LETTERS, Fleet


class _Seen:
    """What both have in common: the catalog, and what can be asked of it."""

    def __init__(self, database: Database, catalog: Catalog) -> None:
        self._database = database
        self._catalog = catalog
        self._fleet = Fleet(relays=[])

    async def _read(self, relays: Sequence[RelayStatus]) -> None:
        """Read the pipelines, with lag and dead letters of those that none of these relays runs."""
        rows = [
            msgspec.structs.replace(row, config=masked(row.config))
            for row in readers_of(await self._catalog.pipelines())
        ]
        running = {status.name for relay in relays for status in relay.pipelines}
        resting = [row.name for row in rows if row.name not in running]
        lags = await self._catalog.lag(resting) if resting else []
        ongoing: list[Backfill | Seek] = [
            *await self._catalog.backfills(),
            *await self._catalog.seeks(),
        ]
        self._fleet = Fleet(
            relays=relays,
            catalog=rows,
            lags={lag.pipeline: lag for lag in lags},
            dead_letters=await self._catalog.dead_letter_counts(resting) if resting else {},
            ongoing=[one for one in ongoing if not one.is_over],
        )

    async def dead_letters(self, pipeline: str) -> Sequence[DeadLetterSummary]:
        """The latest of its dead letters, a reader of all of its pipeline; the newest first."""
        return await self._catalog.latest_dead_letters(pipeline_of(pipeline), LATEST_DEAD_LETTERS)

    async def pause(self, pipeline: str) -> None:
        """Disable it, as any user would; one reader with all others of its pipeline."""
        await self._database.execute(
            "pausing the pipeline", "select disable_relay($1)", pipeline_of(pipeline)
        )

    async def resume(self, pipeline: str) -> None:
        """Enable it, as any user would."""
        await self._database.execute(
            "resuming the pipeline", "select enable_relay($1)", pipeline_of(pipeline)
        )

    async def retry_dead_letters(self, pipeline: str) -> int:
        """Ask for another try of all its dead letters; gives their number."""
        row = await self._database.fetch_row(
            "retrying dead letters",
            "select relay_dlq_retry_all($1) as requested",
            pipeline_of(pipeline),
        )
        return 0 if row is None else int(row["requested"])

    async def retry_dead_letter(self, letter: int) -> None:
        """Ask for another try of the dead letter with this id."""
        await self._database.execute("retrying a dead letter", "select relay_dlq_retry($1)", letter)


class OwnRelay(_Seen):
    """One relay: its board, and the catalog for what it does not run. Implements `Watched`."""

    def __init__(self, board: Board, database: Database, catalog: Catalog) -> None:
        super().__init__(database, catalog)
        self._board = board

    def fleet(self) -> Fleet:
        """The board now, everything else as of the last `refresh`."""
        return msgspec.structs.replace(self._fleet, relays=[self._board.snapshot()])

    async def refresh(self) -> None:
        """Read the pipelines, and how far those are behind that this relay does not run."""
        await self._read([self._board.snapshot()])


class OneRelay:
    """The relay at an address, which may be all that answers. Implements `Watched`.

    Nothing can be done through it, since that takes the database.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._fleet = Fleet(relays=[])

    def fleet(self) -> Fleet:
        """The relay as of the last `refresh`."""
        return self._fleet

    async def refresh(self) -> None:
        """Ask the relay. Raises as `status_of`."""
        self._fleet = Fleet(relays=[await status_of(self._address)])

    async def dead_letters(self, _: str) -> Sequence[DeadLetterSummary]:
        """None: a relay knows their number only."""
        return ()

    async def pause(self, pipeline: str) -> None:
        """Refused, with what does it."""
        raise _by_database(f"select disable_relay('{pipeline_of(pipeline)}')")

    async def resume(self, pipeline: str) -> None:
        """Refused, with what does it."""
        raise _by_database(f"select enable_relay('{pipeline_of(pipeline)}')")

    async def retry_dead_letters(self, pipeline: str) -> int:
        """Refused, with what does it."""
        raise _by_database(f"select relay_dlq_retry_all('{pipeline_of(pipeline)}')")

    async def retry_dead_letter(self, letter: int) -> None:
        """Refused, with what does it."""
        raise _by_database(f"select relay_dlq_retry({letter})")


def _by_database(call: str) -> ConfigurationError:
    return ConfigurationError(
        f"a relay only shows; in the database: {call}, or status without --relay"
    )


class WholeFleet(_Seen):
    """All relays of the group, as they report to the database. Implements `Watched`."""

    def fleet(self) -> Fleet:
        """The fleet as of the last `refresh`."""
        return self._fleet

    async def refresh(self) -> None:
        """Read what the relays report, the pipelines, and how far those that rest are behind."""
        alive = [one for one in await self._catalog.fleet() if one.is_alive]
        await self._read([report for one in alive if (report := report_of(one)) is not None])
