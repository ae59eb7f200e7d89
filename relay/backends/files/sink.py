"""The sink: whole batches are encoded here, and written and synced by one thread per sink."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from relay.backends.files.errors import allowed_path
from relay.backends.files.format import Format, file_format
from relay.backends.files.options import FileSinkOptions
from relay.backends.files.output import FileOutput, Output
from relay.backends.files.stdout import STDOUT
from relay.context import BackendContext
from relay.contracts import ALL_ACCEPTED, Failure, PublishResult
from relay.errors import ConfigurationError, NotConnected
from relay.message import RelayMessage
from relay.options import parse_options
from relay.template import Render, compile_routing

# A thread that encodes would contend with the loop for the interpreter.
_ENCODED_IN_A_TURN = 250


class FileSink:
    """Writes to one file, or to stdout. See the package for what it guarantees."""

    def __init__(self, output: Output, format_: Format, subject_of: Render, name: str) -> None:
        self._output = output
        self._format = format_
        self._render = subject_of
        self._name = name
        self._thread: ThreadPoolExecutor | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from the ``sink`` object of a pipeline. Raises `ConfigurationError`."""
        parsed = parse_options(options, FileSinkOptions, path="sink")
        if parsed.format == "csv" and parsed.content is not None:
            raise ConfigurationError(
                "sink.content does not go with format csv",
                remedy="the columns of csv are fixed; use jsonl or json_pretty",
            )
        render = compile_routing(parsed.subject_template, parsed.routing)
        format_ = file_format(parsed.format, parsed.content or "envelope", context.dedup_namespace)
        if parsed.output is None:
            return cls(STDOUT.writer(format_.header), format_, render, "stdout")
        allowed_path(parsed.output, context.file_roots)
        output = FileOutput(
            parsed.output,
            context.file_roots,
            format_,
            rotate_bytes=parsed.rotate_bytes,
            rotate_keep=parsed.rotate_keep,
        )
        return cls(output, format_, render, parsed.output)

    async def connect(self) -> None:
        """Open the file, as the only writer, and repair its end."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="file-sink")
        # A cancelled publish may still be waiting for a reader that does not read.
        self._output.stop()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._output.open)

    def subject_of(self, message: RelayMessage) -> str:
        """What the template says."""
        return self._render(message)

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        """Write all and sync. A cancelled publish may still be written, before anything later."""
        thread = self._thread
        if thread is None or not self._output.is_open:
            raise NotConnected(f"{self._name} is not open")
        lines, failures = await self._encoded(messages)
        if self._thread is not thread:
            raise NotConnected(f"{self._name} was closed")
        if lines:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(thread, self._output.append, lines)
        return PublishResult(failures=failures) if failures else ALL_ACCEPTED

    async def is_healthy(self) -> bool:
        """True while the file is open and its last write has worked."""
        return self._output.is_open

    async def aclose(self) -> None:
        """Close the file behind what is still being written."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._output.stop()
        closing = asyncio.get_running_loop().run_in_executor(thread, self._output.close)
        thread.shutdown(wait=False)
        with contextlib.suppress(Exception):
            await asyncio.shield(closing)

    async def _encoded(self, messages: Sequence[RelayMessage]) -> tuple[list[bytes], list[Failure]]:
        """The lines, and what can't be one. Others get their turn in between."""
        lines: list[bytes] = []
        failures: list[Failure] = []
        for start in range(0, len(messages), _ENCODED_IN_A_TURN):
            await asyncio.sleep(0)
            some = messages[start : start + _ENCODED_IN_A_TURN]
            for index, line in enumerate(self._format.encode(some), start):
                if isinstance(line, bytes):
                    lines.append(line)
                else:
                    failures.append(Failure(index, line))
        return lines, failures
