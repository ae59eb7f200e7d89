"""The file source under the contract, following its file, and the stdin source on a pipe."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

import pytest

from relay.backends.files import FileSource, StdinSource
from relay.backends.files.errors import file_errors
from relay.backends.files.options import FileSourceOptions
from relay.backends.files.stdin import StdinInput
from relay.catalog import Catalog
from relay.contracts import Source
from relay.errors import OwnershipLost
from relay.message import RelayMessage
from relay.postgres import Database
from relay.settings import PostgresSettings
from relay.wire import LOWER, encoder
from tests.contract.evidence import dedup_keys, numbered
from tests.contract.source_contract import SourceContract, SourceHarness, collect, messages_of
from tests.contract.surroundings import RememberedPositions, backend_context
from tests.servers.postgres import Database as ServerDatabase


class FileSourceHarness(SourceHarness):
    def __init__(self, directory: Path, catalog: Catalog) -> None:
        self._directory = directory
        self._path = directory / "in.jsonl"
        self._path.touch()
        self._catalog = catalog
        self._encode = encoder("envelope", LOWER)

    def make(self, *, batch_size: int = 100) -> Source:
        context = backend_context(
            catalog=self._catalog,
            direction="reverse",
            file_roots=(self._directory,),
            batch_size=batch_size,
        )
        return FileSource.from_options(
            {"type": "file", "input": str(self._path), "follow": True}, context
        )

    async def feed(self, messages: Sequence[RelayMessage]) -> None:
        self._append(self._encode(message).body for message in messages)

    async def feed_bodies(self, bodies: Sequence[bytes]) -> Sequence[bytes]:
        held = [body for body in bodies if body.strip() and b"\n" not in body]
        self._append(held)
        return held

    def mapping(self) -> AbstractContextManager[None]:
        return file_errors("testing", "in.jsonl")

    def exceptions(self) -> Iterable[BaseException]:
        yield from (OSError(number, name) for number, name in errno.errorcode.items())
        yield OSError()
        yield ValueError("embedded null byte")
        yield UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")

    def _append(self, lines: Iterable[bytes]) -> None:
        with self._path.open("ab") as file:
            file.writelines(line + b"\n" for line in lines)


class StdinSourceHarness(SourceHarness):
    """A pipe in the place of stdin; a thread fills it as fast as it is read."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        self._stdin = StdinInput(self._reader)
        self._thread = ThreadPoolExecutor(1)
        self._encode = encoder("envelope", LOWER)

    def make(self, *, batch_size: int = 100) -> Source:
        context = backend_context(direction="reverse", batch_size=batch_size)
        return StdinSource(FileSourceOptions(type="stdin"), self._stdin, context)

    async def feed(self, messages: Sequence[RelayMessage]) -> None:
        self._write(self._encode(message).body for message in messages)

    async def feed_bodies(self, bodies: Sequence[bytes]) -> Sequence[bytes]:
        held = [body for body in bodies if body.strip() and b"\n" not in body]
        self._write(held)
        return held

    def mapping(self) -> AbstractContextManager[None]:
        return file_errors("testing", "stdin")

    def exceptions(self) -> Iterable[BaseException]:
        yield from (OSError(number, name) for number, name in errno.errorcode.items())

    def close(self) -> None:
        os.close(self._reader)
        self._thread.shutdown()
        os.close(self._writer)

    def _write(self, lines: Iterable[bytes]) -> None:
        data = b"".join(line + b"\n" for line in lines)
        self._thread.submit(self._write_all, data)

    def _write_all(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._writer, data) :]


async def test_the_position_is_kept_in_the_catalog(
    tmp_path: Path, migrated_database: ServerDatabase
) -> None:
    database = Database(PostgresSettings(url=migrated_database.dsn))
    await database.open()
    harness = FileSourceHarness(tmp_path, Catalog(database, "default"))
    await harness.feed(numbered(20))
    first, second = harness.make(batch_size=10), harness.make()
    await first.connect()
    batches = await collect(first, 20)
    await first.acknowledge(batches[0])

    await second.connect()
    with pytest.raises(OwnershipLost):
        await first.acknowledge(batches[1])

    again = await collect(second, 10)
    assert dedup_keys(messages_of(again)) == dedup_keys(numbered(10, start=10))
    await first.aclose()
    await second.aclose()
    await database.aclose()


class TestFileSource(SourceContract):
    backend = "file"
    lacks: ClassVar = {
        "reconnect": "a file has no connection",
        "restart": "a file has no server",
        "keep alive": "a position in a file does not expire",
        "tls": "a file has no connection",
        "lag": "a file tells bytes, not messages",
        "authentication": "a file knows permissions only, which are tested apart",
    }

    @pytest.fixture
    async def harness(self, tmp_path: Path) -> FileSourceHarness:
        return FileSourceHarness(tmp_path, RememberedPositions())


class TestStdinSource(SourceContract):
    backend = "stdin"
    lacks: ClassVar = {
        "reconnect": "a stream has no connection",
        "restart": "a stream has no server",
        "keep alive": "what is held in memory does not expire",
        "tls": "a stream has no connection",
        "lag": "a stream does not tell what is still to come",
        "authentication": "a stream asks for no credentials",
    }

    @pytest.fixture
    async def harness(self) -> AsyncIterator[StdinSourceHarness]:
        harness = StdinSourceHarness()
        yield harness
        harness.close()
