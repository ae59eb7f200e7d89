"""Relays as a status view sees them: the one of this process, or the fleet of the database."""

from __future__ import annotations

from collections.abc import Sequence

from relay.board import Board
from relay.catalog import Catalog, PipelineRow
from relay.overview import report_of
from relay.postgres import Database
from relay.status.fleet import Fleet


class _Seen:
    """What both have in common: the catalog, and what can be asked of it."""

    def __init__(self, database: Database, catalog: Catalog) -> None:
        self._database = database
        self._catalog = catalog
        self._rows: Sequence[PipelineRow] = ()

    async def refresh(self) -> None:
        """Read the pipelines of the catalog."""
        self._rows = await self._catalog.pipelines()

    async def pause(self, pipeline: str) -> None:
        """Disable it, as any user would."""
        await self._database.execute("pausing the pipeline", "select disable_relay($1)", pipeline)

    async def resume(self, pipeline: str) -> None:
        """Enable it, as any user would."""
        await self._database.execute("resuming the pipeline", "select enable_relay($1)", pipeline)

    async def retry_dead_letters(self, pipeline: str) -> int:
        """Ask for another try of all its dead letters; gives their number."""
        row = await self._database.fetch_row(
            "retrying dead letters",
            "select relay_dlq_retry_all($1) as requested",
            pipeline,
        )
        return 0 if row is None else int(row["requested"])


class OwnRelay(_Seen):
    """One relay: its board, and the catalog for what is paused. Implements `Watched`."""

    def __init__(self, board: Board, database: Database, catalog: Catalog) -> None:
        super().__init__(database, catalog)
        self._board = board

    def fleet(self) -> Fleet:
        """The board now, the catalog as of the last `refresh`."""
        return Fleet(relays=[self._board.snapshot()], catalog=self._rows)


class WholeFleet(_Seen):
    """All relays of the group, as they report to the database. Implements `Watched`."""

    def __init__(self, database: Database, catalog: Catalog) -> None:
        super().__init__(database, catalog)
        self._fleet = Fleet(relays=[])

    def fleet(self) -> Fleet:
        """The fleet as of the last `refresh`."""
        return self._fleet

    async def refresh(self) -> None:
        """Read what the relays report, the pipelines, and how far those are behind."""
        await super().refresh()
        alive = [one for one in await self._catalog.fleet() if one.is_alive]
        lags = await self._catalog.lag([row.name for row in self._rows])
        self._fleet = Fleet(
            relays=[report for one in alive if (report := report_of(one)) is not None],
            catalog=self._rows,
            lags={lag.pipeline: lag.lag_rows for lag in lags},
        )
