"""A file as a place where lines come from: with a position, over its rotations.

Blocking; used from one thread.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Sequence
from enum import Enum
from itertools import zip_longest
from pathlib import Path

import msgspec

from relay.backends.files.errors import allowed_path, file_errors
from relay.backends.files.line import Line, LineBuffer
from relay.errors import ConfigurationError, DestinationMissing, NotConnected

ROTATION_QUIET_S = 1.0
"""How long a rotated file must stay as it is before it counts as finished: its writer learns of
the rotation a little later than we do."""

_CHUNK_BYTES = 256 * 1024
_HEAD_BYTES = 256
_TAIL_BYTES = 64


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """A position in a file, and by what the file is recognised.

    ``head``: digest of the first line's first ``head_bytes``, empty while there is no line.
    ``tail``: digest of the bytes before the offset. ``generation`` counts the files that this
    pipeline has begun, so that no two of them share an identity.
    """

    device: int
    inode: int
    head: str
    head_bytes: int
    tail: str
    generation: int
    offset: int

    @property
    def identity(self) -> str:
        """What tells this file from all others in dedup keys."""
        seed = f"{self.device}:{self.inode}:{self.head}:{self.generation}"
        return hashlib.sha256(seed.encode()).hexdigest()[:16]


class Outlook(Enum):
    """What comes after what was read."""

    MORE = "more"
    WAIT = "wait"
    END = "end"


class Reading(msgspec.Struct, frozen=True):
    """What one `FileInput.read` gave.

    ``span``: where the lines, all of one file, began and ended; None where there are none.
    ``opening`` counts the calls of `FileInput.open`: what was read before one is void after it.
    """

    lines: Sequence[Line]
    outlook: Outlook
    opening: int
    span: tuple[Mark, Mark] | None = None


class FileInput:
    """Reads one file from a position, then what it was rotated into, oldest first."""

    def __init__(
        self, path: str, roots: Sequence[Path], *, follow: bool, max_line_bytes: int
    ) -> None:
        self._name = path
        self._roots = roots
        self._follow = follow
        self._max_line_bytes = max_line_bytes
        self._path = Path(path)
        self._file: int | None = None
        self._mark: Mark | None = None
        self._lines = LineBuffer(0, max_line_bytes)
        self._openings = 0
        self._is_waiting_for_file = False
        self._seen_bytes = -1
        self._quiet_since = 0.0

    @property
    def is_open(self) -> bool:
        """True while a file is open, or awaited."""
        return self._file is not None or self._is_waiting_for_file

    def open(self, mark: Mark | None) -> None:
        """Resume behind a mark, or begin. Raises `Outage`, `ConfigurationError`."""
        self._openings += 1
        self.close()
        self._path = allowed_path(self._name, self._roots)
        with file_errors("opening it", self._name):
            if mark is None:
                self._begin(self._path, 0)
            else:
                self._resume(mark)

    def read(self, max_lines: int, max_bytes: int) -> Reading:
        """The next lines, without waiting. Raises `Outage`, `ConfigurationError`."""
        try:
            with file_errors("reading", self._name):
                return self._read(max_lines, max_bytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file. Idempotent, never raises."""
        file, self._file = self._file, None
        self._mark = None
        self._is_waiting_for_file = False
        self._seen_bytes = -1
        if file is not None:
            os.close(file)

    def _read(self, max_lines: int, max_bytes: int) -> Reading:
        if not self.is_open:
            raise NotConnected(f"{self._name} is not open")
        if self._is_waiting_for_file and not self._next_file():
            return Reading((), Outlook.WAIT, self._openings)
        lines = self._complete_lines(max_lines, max_bytes)
        # After reading: what was read is of a file that still has what we know of it.
        if self._mark is not None and not self._is_marked(self._require(), self._mark):
            return self._begin_again()
        outlook = Outlook.MORE
        if not lines:
            outlook = self._look()
            if outlook is not Outlook.WAIT:
                last = self._lines.finish()
                lines = [] if last is None else [last]
            if not lines and outlook is Outlook.MORE and not self._next_file():
                outlook = Outlook.WAIT if self._follow else Outlook.END
        return self._reading(lines, outlook)

    def _complete_lines(self, max_lines: int, max_bytes: int) -> list[Line]:
        lines: list[Line] = []
        taken = 0
        while len(lines) < max_lines and taken < max_bytes:
            line = self._lines.next()
            if line is not None:
                lines.append(line)
                taken += line.end - line.offset
                continue
            chunk = os.pread(self._require(), _CHUNK_BYTES, self._lines.end)
            if not chunk:
                break
            self._lines.feed(chunk)
        return lines

    def _reading(self, lines: Sequence[Line], outlook: Outlook) -> Reading:
        start = self._mark
        if not lines or start is None:
            return Reading((), outlook, self._openings)
        if not start.head_bytes:
            head, head_bytes = self._head()
            start = msgspec.structs.replace(start, head=head, head_bytes=head_bytes)
        end = msgspec.structs.replace(
            start, offset=lines[-1].end, tail=_tail(self._require(), lines[-1].end)
        )
        self._mark = end
        return Reading(lines, outlook, self._openings, (start, end))

    def _look(self) -> Outlook:
        """What follows the end of the open file: MORE means a successor."""
        here = os.fstat(self._require())
        if here.st_size < self._lines.end and self._mark is not None:
            # Its writer took back an unfinished line, as our sink does after a crash.
            self._lines = LineBuffer(self._mark.offset, self._max_line_bytes)
            return Outlook.WAIT
        at_path = _status(self._path)
        is_current = at_path is not None and os.path.samestat(at_path, here)
        if is_current or (at_path is None and self._place_of(here)[1] is None):
            return Outlook.WAIT if self._follow else Outlook.END
        return Outlook.MORE if self._is_quiet(here.st_size) else Outlook.WAIT

    def _begin_again(self) -> Reading:
        """Cut back or overwritten in place: what is in it now is another file's content."""
        generation = self._generation() + 1
        path, _ = self._place_of(os.fstat(self._require()))
        self.close()
        self._begin(path or self._path, generation)
        return Reading((), Outlook.MORE, self._openings)

    def _is_quiet(self, size_bytes: int) -> bool:
        now = time.monotonic()
        if size_bytes != self._seen_bytes:
            self._seen_bytes, self._quiet_since = size_bytes, now
        return now - self._quiet_since >= ROTATION_QUIET_S

    def _next_file(self) -> bool:
        """Go on to what came after the open file; False while that does not exist."""
        generation = self._generation() + 1
        here = None if self._file is None else os.fstat(self._file)
        following = self._path if here is None else self._place_of(here)[1] or self._path
        if _status(following) is None:
            return False
        self.close()
        self._begin(following, generation)
        return True

    def _begin(self, path: Path, generation: int) -> None:
        file = _open(path, self._name)
        status = os.fstat(file)
        mark = Mark(
            device=status.st_dev,
            inode=status.st_ino,
            head="",
            head_bytes=0,
            tail="",
            generation=generation,
            offset=0,
        )
        self._use(file, mark)

    def _resume(self, mark: Mark) -> None:
        there = [path for path in self._candidates() if _status(path) is not None]
        for path in there:
            if path.lstat().st_ino == mark.inode:
                self._resume_in(path, mark)
                return
        if there and self._follow:
            # Rotated files that are still there are younger than the one that is gone.
            self._begin(there[0], mark.generation + 1)
        elif self._path in there:
            self._begin(self._path, mark.generation + 1)
        elif self._follow:
            # Followed before and away now: its successor will appear.
            self._mark = mark
            self._is_waiting_for_file = True
        else:
            raise DestinationMissing(f"{self._name} does not exist", remedy="create the file")

    def _resume_in(self, path: Path, mark: Mark) -> None:
        file = _open(path, self._name)
        if self._is_marked(file, mark):
            self._use(file, mark)
        else:
            # Truncated and rewritten, or another file under a reused number.
            os.close(file)
            self._begin(path, mark.generation + 1)

    def _use(self, file: int, mark: Mark) -> None:
        self._file = file
        self._mark = mark
        self._is_waiting_for_file = False
        self._lines = LineBuffer(mark.offset, self._max_line_bytes)
        self._seen_bytes = -1

    def _is_marked(self, file: int, mark: Mark) -> bool:
        return (
            os.fstat(file).st_size >= mark.offset
            and _digest(os.pread(file, mark.head_bytes, 0)) == (mark.head or _digest(b""))
            and _tail(file, mark.offset) == (mark.tail or _digest(b""))
        )

    def _candidates(self) -> list[Path]:
        """The rotated files ``name.n``, oldest first, and the file itself."""
        expression = re.compile(re.escape(self._path.name) + r"\.(\d+)")
        numbered = [
            (int(found[1]), path)
            for path in self._path.parent.iterdir()
            if (found := expression.fullmatch(path.name))
        ]
        return [path for _, path in sorted(numbered, reverse=True)] + [self._path]

    def _place_of(self, here: os.stat_result) -> tuple[Path | None, Path | None]:
        """Where this file is among the candidates, and what is next after it."""
        candidates = self._candidates()
        for path, following in zip_longest(candidates, candidates[1:]):
            status = _status(path)
            if status is not None and os.path.samestat(status, here):
                return path, following
        return None, None

    def _head(self) -> tuple[str, int]:
        beginning = os.pread(self._require(), _HEAD_BYTES, 0).partition(b"\n")[0]
        return _digest(beginning), len(beginning)

    def _generation(self) -> int:
        return 0 if self._mark is None else self._mark.generation

    def _require(self) -> int:
        if self._file is None:
            raise NotConnected(f"{self._name} is not open")
        return self._file


def _open(path: Path, name: str) -> int:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    raise ConfigurationError(f"{name} is not a regular file", remedy="use type stdin for a pipe")


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _tail(file: int, offset: int) -> str:
    start = max(0, offset - _TAIL_BYTES)
    return _digest(os.pread(file, offset - start, start))
