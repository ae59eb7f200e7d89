"""What a backend is given when it is built, and what it may ask of the relay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from relay.catalog import Catalog
from relay.events import Direction, Event
from relay.partition import WHOLE, Partition
from relay.postgres import Database
from relay.shape import Shape


class BackendContext(msgspec.Struct, frozen=True, kw_only=True):
    """The surroundings of one pipeline's source or sink.

    ``file_roots``: the directories a file backend may touch. ``dedup_namespace``: in front of every
    dedup key and of a CloudEvents source, or empty. ``ordering``: what the pipeline says, or None
    for the backend's own default. ``shape``: for a source that applies it itself, since updates are
    put together only behind it. ``partition``: whose keys the source reads, where ``pipeline`` is
    one of several readers; ``partitioning`` is what it claims them by. Durations in seconds, sizes
    in bytes.
    """

    pipeline: str
    direction: Direction
    worker_id: str
    database: Database
    catalog: Catalog
    emit: Callable[[Event], None]
    file_roots: tuple[Path, ...]
    batch_size: int
    batch_bytes: int
    poll_interval_s: float
    dedup_namespace: str = ""
    ordering: Literal["strict", "pipelined"] | None = None
    shape: Shape | None = None
    pipeline_options: Mapping[str, object] = {}
    partition: Partition = WHOLE
    partitioning: Mapping[str, object] = {}
