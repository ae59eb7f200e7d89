"""The relay of this process as its own status view sees it."""

from __future__ import annotations

from collections.abc import Sequence

from relay.board import Board
from relay.catalog import Catalog, PipelineRow
from relay.postgres import Database
from relay.status.fleet import Fleet


class OwnRelay:
    """One relay: its board, and the catalog for what is paused. Implements `Watched`."""

    def __init__(self, board: Board, database: Database, catalog: Catalog) -> None:
        self._board = board
        self._database = database
        self._catalog = catalog
        self._rows: Sequence[PipelineRow] = ()

    def fleet(self) -> Fleet:
        """The board now, the catalog as of the last `refresh`."""
        return Fleet(relays=[self._board.snapshot()], catalog=self._rows)

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
