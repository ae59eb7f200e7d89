"""The file sink under the contract, writing to a file of its own and to stdout."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

import pytest

from relay.backends.files import FileSink
from relay.backends.files.errors import file_errors
from relay.backends.files.format import file_format
from relay.backends.files.stdout import StreamOutput
from relay.message import RelayMessage
from relay.template import compile_template
from relay.wire import LOWER, restore
from tests.contract.evidence import until
from tests.contract.sink_contract import SinkContract, SinkHarness
from tests.contract.surroundings import backend_context


class FileSinkHarness(SinkHarness):
    def __init__(self, directory: Path) -> None:
        self._path = directory / "out.jsonl"
        self._context = backend_context(file_roots=(directory,))

    def make(self) -> FileSink:
        return FileSink.from_options({"type": "file", "output": str(self._path)}, self._context)

    async def received(self, at_least: int) -> Sequence[RelayMessage]:
        return await until(self._read, at_least)

    def unacceptable(self, dedup_key: str) -> RelayMessage:
        return RelayMessage(dedup_key=dedup_key, payload=b"no JSON")

    def mapping(self) -> AbstractContextManager[None]:
        return file_errors("testing", "out.jsonl")

    def exceptions(self) -> Iterable[BaseException]:
        yield from (OSError(number, name) for number, name in errno.errorcode.items())
        yield OSError()
        yield ValueError("embedded null byte")
        yield UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")

    async def _read(self) -> Sequence[RelayMessage]:
        found = []
        for line in self._path.read_bytes().splitlines():
            message = restore(line, {LOWER.format: "envelope"}, LOWER)
            assert message is not None
            found.append(message)
        return found


class StdoutSinkHarness(FileSinkHarness):
    """Stdout that was redirected to a file."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._stream = StreamOutput(self._file, "stdout")

    def make(self) -> FileSink:
        format_ = file_format("jsonl", "envelope", "")
        render = compile_template("{stream_table}.{op}")
        return FileSink(self._stream.writer(format_.header), format_, render, "stdout")

    def close(self) -> None:
        os.close(self._file)


class TestFileSink(SinkContract):
    backend = "file"
    lacks: ClassVar = {
        "deduplication": "a file keeps every repeat, with the same dedup key",
        "order under failure": "a file has no connection that could break between two lines",
        "reconnect": "a file has no connection",
        "restart": "a file has no server",
        "oversize": "a file takes lines of any length",
        "tls": "a file has no connection",
        "authentication": "a file knows permissions only, which are tested apart",
    }

    @pytest.fixture
    async def harness(self, tmp_path: Path) -> FileSinkHarness:
        return FileSinkHarness(tmp_path)


class TestStdoutSink(SinkContract):
    backend = "stdout"
    lacks: ClassVar = {
        "deduplication": "a stream keeps every repeat, with the same dedup key",
        "order under failure": "a stream that broke stays broken",
        "reconnect": "a stream that broke stays broken",
        "restart": "a stream has no server",
        "oversize": "a stream takes lines of any length",
        "tls": "a stream has no connection",
        "authentication": "a stream asks for no credentials",
    }

    @pytest.fixture
    async def harness(self, tmp_path: Path) -> AsyncIterator[StdoutSinkHarness]:
        harness = StdoutSinkHarness(tmp_path)
        yield harness
        harness.close()
