"""Files of JSON lines, in a temporary directory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from relay.settings import RelaySettings
from scripts.benchmark.backends import Destination, Origin, Stretch, observed, payload
from scripts.benchmark.surroundings import Surroundings

# As many as the relay puts into a batch by default, which it syncs as a whole.
FLOOR_BATCH_LINES: Final = RelaySettings().batch_size

# A large buffer, made for each look, would cost more than what it holds.
_LOOK_BYTES: Final = 1 << 16


class _Event(msgspec.Struct, frozen=True):
    dedup_key: str


class ToFile(Destination):
    """`to-file`."""

    title = "a file"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = 0
        self._seen_bytes = self._seen_lines = 0
        self._lines: Sequence[bytes] = ()

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, _: Surroundings) -> AsyncIterator[Destination]:
        """Part of the protocol."""
        with tempfile.TemporaryDirectory(prefix="pgtrickle-bench-file-") as directory:
            yield cls(Path(directory))

    @property
    def _path(self) -> Path:
        return self._directory / f"{self._files}.jsonl"

    def sink(self) -> Mapping[str, object]:
        return {"type": "file", "output": str(self._path)}

    async def empty(self) -> None:
        # The relay may still have the last one open.
        self._files += 1
        self._seen_bytes = self._seen_lines = 0
        self._lines = ()

    async def until_holding(self, messages: int, timeout_s: float) -> Stretch:
        return await observed(self._count, messages, timeout_s)

    async def read(self) -> set[str]:
        content = await asyncio.to_thread(self._path.read_bytes)
        self._lines = content.splitlines(keepends=True)
        decode = msgspec.json.Decoder(_Event).decode
        return {decode(line).dedup_key for line in self._lines}

    async def floor(self) -> float:
        elapsed_s = await asyncio.to_thread(_written, self._directory / "floor", self._lines)
        return len(self._lines) / elapsed_s

    async def _count(self) -> int:
        """Complete lines; reads only what is new since the last look."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb", buffering=0) as file:
            file.seek(self._seen_bytes)
            while chunk := file.read(_LOOK_BYTES):
                self._seen_bytes += len(chunk)
                self._seen_lines += chunk.count(b"\n")
        return self._seen_lines


class FromFile(Origin):
    """`from-file`."""

    title = "a file"
    target_per_s: float | None = None
    hard_bar_per_s: float | None = None

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = 0
        self._messages = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, _: Surroundings) -> AsyncIterator[Origin]:
        """Part of the protocol."""
        with tempfile.TemporaryDirectory(prefix="pgtrickle-bench-file-") as directory:
            yield cls(Path(directory))

    @property
    def _path(self) -> Path:
        return self._directory / f"{self._files}.jsonl"

    def source(self) -> Mapping[str, object]:
        return {"type": "file", "input": str(self._path), "follow": True}

    async def fill(self, messages: int) -> None:
        self._files += 1
        self._messages = messages
        lines = [payload(number) + b"\n" for number in range(messages)]
        await asyncio.to_thread(self._path.write_bytes, b"".join(lines))

    async def floor(self) -> float:
        lines, elapsed_s = await asyncio.to_thread(_counted, self._path)
        if lines != self._messages:
            raise RuntimeError(f"{lines} of {self._messages} lines were read")
        return lines / elapsed_s


def _written(path: Path, lines: Sequence[bytes]) -> float:
    """Write the lines, each batch synced; how long that took, in seconds."""
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(lines), FLOOR_BATCH_LINES):
            file.write(b"".join(lines[start : start + FLOOR_BATCH_LINES]))
            os.fdatasync(file.fileno())
    elapsed_s = time.perf_counter() - started
    if path.stat().st_size != sum(map(len, lines)):
        raise RuntimeError("the floor did not write every line")
    return elapsed_s


def _counted(path: Path) -> tuple[int, float]:
    """Read line by line; how many, and how long that took, in seconds."""
    started = time.perf_counter()
    with path.open("rb") as file:
        lines = sum(1 for _ in file)
    return lines, time.perf_counter() - started
