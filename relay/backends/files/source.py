"""The source of files, which remembers its position in the catalog."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from relay.backends.files.errors import allowed_path
from relay.backends.files.input import FileInput, Mark, Outlook, Reading
from relay.backends.files.line import Line, decode_line
from relay.backends.files.options import FileSourceOptions
from relay.backends.files.stdin import STDIN, StdinSource
from relay.context import BackendContext
from relay.contracts import Batch, NothingExpires, Source, sorted_out
from relay.errors import EndOfInput, NotConnected, PositionLost, RelayError
from relay.options import parse_options

IDLE_POLL_S = 1.0
LONGEST_PAUSE_S = 0.5

_mark = msgspec.json.Decoder(Mark)


class FileSource(NothingExpires):
    """Reads the lines of a file. See the package for what it guarantees."""

    def __init__(self, options: FileSourceOptions, path: str, context: BackendContext) -> None:
        self._options = options
        self._context = context
        self._subject = Path(path).name
        self._cursor_key = f"file:{path}"
        self._input = FileInput(
            path,
            context.file_roots,
            follow=options.follow,
            max_line_bytes=options.max_line_bytes,
        )
        self._thread: ThreadPoolExecutor | None = None
        self._epoch: int | None = None
        self._openings = 0
        self._sequence = 0
        # Unacknowledged batches: their number to where they began.
        self._out: dict[int, Mark] = {}
        self._interrupted = asyncio.Event()
        self._pause_s = context.poll_interval_s

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Source:
        """Build from the ``source`` object of a pipeline. Raises `ConfigurationError`."""
        parsed = parse_options(options, FileSourceOptions, path="source")
        if parsed.type == "stdin":
            return StdinSource(parsed, STDIN, context)
        return cls(parsed, str(allowed_path(parsed.input or "", context.file_roots)), context)

    async def connect(self) -> None:
        """Claim the position and open the file behind it."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="file-source")
        context = self._context
        claim = await context.catalog.claim(context.pipeline, None, context.worker_id)
        self._epoch = claim.epoch
        cursor = await context.catalog.cursor(context.pipeline, self._cursor_key)
        await self._open(None if cursor is None else self._mark_in(cursor))
        self._out.clear()

    async def poll(self) -> Batch:
        """See `relay.contracts.Source`. Looks at the file more rarely the longer it is silent."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + IDLE_POLL_S
        while True:
            reading = await self._read()
            if reading.span is not None:
                self._pause_s = self._context.poll_interval_s
                return self._batch(reading.lines, *reading.span)
            if reading.outlook is Outlook.END:
                raise EndOfInput
            if reading.outlook is Outlook.MORE and not self._interrupted.is_set():
                continue
            remaining_s = deadline - loop.time()
            if remaining_s <= 0 or self._interrupted.is_set():
                self._interrupted.clear()
                return Batch(is_end_of_backlog=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._pause_s, remaining_s)):
                    await self._interrupted.wait()
            self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)

    def interrupt(self) -> None:
        """See `relay.contracts.Source`."""
        self._interrupted.set()

    async def acknowledge(self, batch: Batch) -> None:
        """Write the position behind the batch; a void batch is left alone."""
        position = batch.position
        if not isinstance(position, _Position) or position.sequence not in self._out:
            return
        if self._epoch is None:
            raise NotConnected(f"{self._subject} is not open")
        await self._context.catalog.set_cursor(
            self._context.pipeline,
            self._epoch,
            self._cursor_key,
            msgspec.json.encode(position.end),
        )
        for sequence in [known for known in self._out if known <= position.sequence]:
            del self._out[sequence]

    async def reject(self, batch: Batch) -> None:
        """Go back to where the batch began; batches behind it become void."""
        position = batch.position
        if not isinstance(position, _Position) or position.sequence not in self._out:
            return
        start = self._out[position.sequence]
        for sequence in [known for known in self._out if known >= position.sequence]:
            del self._out[sequence]
        await self._open(start)
        self._interrupted.set()

    async def is_healthy(self) -> bool:
        """True while the file is open, or a rotated one's successor is awaited."""
        return self._input.is_open

    async def aclose(self) -> None:
        """Close the file and give up the position."""
        thread, self._thread = self._thread, None
        epoch, self._epoch = self._epoch, None
        self._out.clear()
        self._interrupted.set()
        if thread is not None:
            closing = asyncio.get_running_loop().run_in_executor(thread, self._input.close)
            thread.shutdown(wait=False)
            with contextlib.suppress(OSError):
                await asyncio.shield(closing)
        if epoch is not None:
            with contextlib.suppress(RelayError):
                await self._context.catalog.release(self._context.pipeline, epoch)

    async def _open(self, mark: Mark | None) -> None:
        # Counted before the thread gets to it: a reading from before must not be handed out.
        self._openings += 1
        await asyncio.get_running_loop().run_in_executor(self._require(), self._input.open, mark)

    def _mark_in(self, cursor: bytes) -> Mark:
        try:
            return _mark.decode(cursor)
        except msgspec.DecodeError as error:
            raise PositionLost(
                f"the remembered position in {self._subject} can't be read: {error}",
                remedy="delete the pipeline and set it again to begin at the file's start",
            ) from None

    async def _read(self) -> Reading:
        """What the thread reads next; nothing where the file was reopened meanwhile."""
        context = self._context
        reading = await asyncio.get_running_loop().run_in_executor(
            self._require(), self._input.read, context.batch_size, context.batch_bytes
        )
        if reading.opening != self._openings:
            return Reading((), Outlook.MORE, self._openings)
        return reading

    def _batch(self, lines: Sequence[Line], start: Mark, end: Mark) -> Batch:
        options = self._options
        prefix = f"{self._subject}:{end.identity}:"
        messages, rejected = sorted_out(
            decode_line(
                line,
                options.content,
                f"{prefix}{line.offset}",
                self._subject,
                options.max_line_bytes,
            )
            for line in lines
        )
        self._sequence += 1
        self._out[self._sequence] = start
        return Batch(
            messages=messages,
            rejected=rejected,
            position=_Position(self._sequence, end),
            checkpoint=str(end.offset),
        )

    def _require(self) -> ThreadPoolExecutor:
        if self._thread is None:
            raise NotConnected(f"{self._subject} is not open")
        return self._thread


class _Position(msgspec.Struct, frozen=True):
    """The number of a batch, and where the file stands behind it."""

    sequence: int
    end: Mark
