"""The context in which a backend under test is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from relay.catalog import Catalog, Claim
from relay.context import BackendContext
from relay.errors import OwnershipLost
from relay.events import Direction, Event
from relay.postgres import Database
from relay.settings import PostgresSettings


class RememberedPositions(Catalog):
    """A catalog of which a source only needs the cursors, for tests without a server.

    Fenced like the real one: a claim makes every earlier epoch worthless.
    """

    def __init__(self) -> None:
        super().__init__(Database(PostgresSettings()), "default")
        self.cursors: dict[tuple[str, str], bytes] = {}
        self._epochs: dict[str, int] = {}

    async def claim(
        self,
        pipeline: str,
        outbox_table: str | None,  # noqa: ARG002 - the catalog's signature
        worker_id: str,  # noqa: ARG002 - the catalog's signature
        partitioning: Mapping[str, object] | None = None,  # noqa: ARG002 - the catalog's signature
    ) -> Claim:
        epoch = self._epochs[pipeline] = self._epochs.get(pipeline, 0) + 1
        return Claim(epoch=epoch, last_change_id=0, gap_first_ids=(), gap_last_ids=())

    async def release(self, pipeline: str, epoch: int) -> None:
        pass

    async def cursor(self, pipeline: str, cursor_key: str) -> bytes | None:
        return self.cursors.get((pipeline, cursor_key))

    async def set_cursor(self, pipeline: str, epoch: int, cursor_key: str, cursor: bytes) -> None:
        if self._epochs.get(pipeline) != epoch:
            raise OwnershipLost(f"another relay has taken {pipeline}")
        self.cursors[pipeline, cursor_key] = cursor


def backend_context(
    *,
    catalog: Catalog | None = None,
    database: Database | None = None,
    direction: Direction = "forward",
    pipeline: str = "pipeline",
    worker_id: str = "worker",
    file_roots: tuple[Path, ...] = (),
    batch_size: int = 100,
    batch_bytes: int = 1024 * 1024,
    poll_interval_s: float = 0.02,
    dedup_namespace: str = "",
    ordering: str | None = None,
) -> BackendContext:
    """A context for one backend; without a database it can't talk to any."""

    def forget(event: Event) -> None:
        """The contract suites observe the broker, not the relay."""

    return BackendContext(
        pipeline=pipeline,
        direction=direction,
        worker_id=worker_id,
        database=database or Database(PostgresSettings()),
        catalog=catalog or RememberedPositions(),
        emit=forget,
        file_roots=file_roots,
        batch_size=batch_size,
        batch_bytes=batch_bytes,
        poll_interval_s=poll_interval_s,
        dedup_namespace=dedup_namespace,
        ordering=ordering,
    )
