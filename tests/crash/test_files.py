"""Fifty thousand events to and from a file; what goes away here is PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.crash.fifty_thousand import (
    Arrived,
    Blow,
    Destination,
    ForwardProof,
    Origin,
    ReverseProof,
    arrived,
    payload,
)
from tests.integration.relay_surroundings import RelayWorld


class _BesidePostgres:
    """A file, and the database that the relay lives on."""

    def __init__(self, world: RelayWorld, name: str) -> None:
        self._world = world
        self._path: Path = world.directory / name

    async def take_away(self, blow: Blow) -> None:
        await asyncio.to_thread(getattr(self._world.database.server, blow))

    async def bring_back(self) -> None:
        await asyncio.to_thread(self._world.database.server.start)
        await self._world.reconnect()


class _ToFile(_BesidePostgres, Destination):
    is_apart_from_postgres = False

    def __init__(self, world: RelayWorld) -> None:
        super().__init__(world, "out.jsonl")
        self._seen_bytes = self._seen_lines = 0

    def sink(self) -> Mapping[str, object]:
        return {"type": "file", "output": str(self._path)}

    async def count(self) -> int:
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._seen_bytes)
                # A torn line is taken away again when the file is opened: count whole ones.
                whole = file.read().rpartition(b"\n")
            self._seen_bytes += len(whole[0]) + len(whole[1])
            self._seen_lines += whole[0].count(b"\n") + len(whole[1])
        return self._seen_lines

    async def events(self) -> Sequence[Arrived]:
        whole = self._path.read_bytes().rpartition(b"\n")[0]
        return [arrived(line) for line in whole.splitlines()]


class _FromFile(_BesidePostgres, Origin):
    def __init__(self, world: RelayWorld) -> None:
        super().__init__(world, "in.jsonl")
        self._path.touch()

    def source(self) -> Mapping[str, object]:
        return {"type": "file", "input": str(self._path), "follow": True}

    async def put(self, ids: Sequence[int]) -> None:
        with self._path.open("ab") as file:
            file.write(b"".join(payload(id_) + b"\n" for id_ in ids))


class TestForward(ForwardProof):
    @pytest.fixture
    def destination(self, world: RelayWorld) -> Destination:
        return _ToFile(world)


class TestReverse(ReverseProof):
    @pytest.fixture
    def origin(self, world: RelayWorld) -> Origin:
        return _FromFile(world)
