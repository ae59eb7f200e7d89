"""Where lines go: a file that survives crashes. Blocking; used from one thread."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from relay.backends.files.errors import allowed_path, file_errors
from relay.backends.files.format import Format
from relay.errors import ConfigurationError, NotConnected

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_MODE = 0o640


class Output(Protocol):
    """Takes lines and makes them durable."""

    @property
    def is_open(self) -> bool:
        """False before `open`, after `close`, and after a failure."""

    def open(self) -> None:
        """Make ready; on an open output, start over. Raises `Outage`, `ConfigurationError`."""

    def append(self, lines: Sequence[bytes]) -> None:
        """Write all, in order; durable when it returns. Raises `Outage`, `ConfigurationError`."""

    def stop(self) -> None:
        """Make an `append` that waits for somebody give up. Called from another thread."""

    def close(self) -> None:
        """Release everything. Idempotent, never raises."""


class FileOutput:
    """A file of ours alone, with rotation: ``output.1`` is the youngest rotated file."""

    def __init__(
        self,
        path: str,
        roots: Sequence[Path],
        format_: Format,
        *,
        rotate_bytes: int | None = None,
        rotate_keep: int | None = None,
    ) -> None:
        self._name = path
        self._roots = roots
        self._format = format_
        self._rotate_bytes = rotate_bytes
        self._rotate_keep = rotate_keep
        self._path = Path(path)
        self._file: int | None = None

    @property
    def is_open(self) -> bool:
        """See `Output`."""
        return self._file is not None

    def open(self) -> None:
        """Take the file's lock and remove what a crash left unfinished at its end."""
        self.close()
        self._path = allowed_path(self._name, self._roots)
        with file_errors("opening it", self._name):
            file = self._open_locked()
            try:
                self._repair(file)
                _sync_directory(self._path.parent)
            except BaseException:
                os.close(file)
                raise
        self._file = file

    def append(self, lines: Sequence[bytes]) -> None:
        """See `Output`. On a failure the file is closed, without a torn line where that works."""
        if self._file is None:
            raise NotConnected(f"{self._name} is not open")
        try:
            with file_errors("writing", self._name):
                self._follow_path()
                self._write_all(lines)
        except BaseException:
            self.close()
            raise

    def stop(self) -> None:
        """Nothing here waits for anybody."""

    def close(self) -> None:
        """See `Output`."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                os.close(file)

    def _open_locked(self) -> int:
        """The file at our path with its lock, held until it is closed."""
        while True:
            file = os.open(self._path, _FLAGS, _MODE)
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise ConfigurationError(
                        f"{self._name} is not a regular file", remedy="choose another output"
                    )
                self._lock(file)
                if _is_at(file, self._path):
                    return file
            except BaseException:
                os.close(file)
                raise
            # It was renamed between opening and locking: the lock is on somebody's old file.
            os.close(file)

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"{self._name} is being written by another pipeline or process",
                remedy="give each pipeline an output of its own",
            ) from None

    def _repair(self, file: int) -> None:
        size = os.fstat(file).st_size
        if size == 0:
            return
        end = self._format.sound_end(file, size)
        if end.keep_bytes < size:
            os.ftruncate(file, end.keep_bytes)
        if end.append:
            _write(file, end.append)
        if end.keep_bytes < size or end.append:
            os.fsync(file)

    def _follow_path(self) -> None:
        """Reopen the file where somebody moved or removed it: nobody would find our lines."""
        if self._file is not None and not _is_at(self._file, self._path):
            self.open()

    def _write_all(self, lines: Sequence[bytes]) -> None:
        pending: list[bytes] = []
        size = self._size()
        for line in lines:
            if self._rotate_bytes and size and size + len(line) > self._rotate_bytes:
                self._write_durably(pending)
                self._rotate()
                pending, size = [], self._size()
            if size == 0:
                pending.append(self._format.header)
                size = len(self._format.header)
            pending.append(line)
            size += len(line)
        self._write_durably(pending)

    def _write_durably(self, lines: Sequence[bytes]) -> None:
        if not lines:
            return
        file = self._require()
        start = os.fstat(file).st_size
        try:
            _write(file, b"".join(lines))
            sync(file)
        except OSError:
            # Whoever reads the file meanwhile need not see half a line.
            with contextlib.suppress(OSError):
                os.ftruncate(file, start)
            raise

    def _rotate(self) -> None:
        """Rename ``output.n`` upwards to the first free number, then begin a new file.

        Each rename is atomic and starts at the free number, so that a crash in between leaves a
        gap and overwrites nothing.
        """
        old = self._require()
        last = 1
        while self._rotated(last).exists() and last != self._rotate_keep:
            last += 1
        if last == self._rotate_keep:
            self._remove_above(last)
        for number in range(last, 1, -1):
            self._rotated(number - 1).replace(self._rotated(number))
        self._path.replace(self._rotated(1))
        self._file = self._open_locked()
        # Until here the old lock keeps a second writer away from both files.
        os.close(old)
        _sync_directory(self._path.parent)

    def _remove_above(self, number: int) -> None:
        """Remove what an earlier, larger ``rotate_keep`` has left."""
        while self._rotated(number + 1).exists():
            number += 1
            self._rotated(number).unlink()

    def _rotated(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def _size(self) -> int:
        return os.fstat(self._require()).st_size

    def _require(self) -> int:
        if self._file is None:
            raise NotConnected(f"{self._name} is not open")
        return self._file


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def sync(file: int) -> None:
    """Make what was written to an open file durable."""
    # Where it exists it saves the inode's times, and writes the size all the same.
    getattr(os, "fdatasync", os.fsync)(file)


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False
