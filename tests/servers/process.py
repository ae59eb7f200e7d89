"""The real relay as a process of its own, for tests that kill it or look at it from outside."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.servers.finding import LOOPBACK

REPOSITORY = Path(__file__).resolve().parents[2]

_LINE_LIMIT_BYTES = 64 * 1024 * 1024


@dataclass(eq=False)
class RelayProcess:
    """A running `python -m relay` (or another module); its output is collected line by line.

    Waiting ends with `AssertionError` and the output so far when the bound is over or the
    process ends first.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str]
    directory: Path
    metrics_port: int
    module: str = "relay"
    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)
    _process: asyncio.subprocess.Process | None = None
    _readers: list[asyncio.Task[None]] = field(default_factory=list)
    _open_streams: int = 0
    _output_moved: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def http_url(self) -> str:
        """Where its metrics and health are served."""
        return f"http://{LOOPBACK}:{self.metrics_port}"

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._running().returncode

    @property
    def output(self) -> str:
        """Everything said so far, stdout first."""
        return "\n".join(["-- stdout", *self.stdout, "-- stderr", *self.stderr])

    async def start(self) -> None:
        """Start the process and collect what it says."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self.module,
            *self.arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=self.directory,
            env=dict(self.environment),
            limit=_LINE_LIMIT_BYTES,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._open_streams = 2
        self._readers = [
            asyncio.create_task(self._collect(self._process.stdout, self.stdout)),
            asyncio.create_task(self._collect(self._process.stderr, self.stderr)),
        ]

    async def wait_for_log(self, pattern: str, *, timeout_s: float = 30.0, since: int = 0) -> str:
        """The first stderr line from number `since` on in which the pattern is found."""
        expression = re.compile(pattern)

        def matching() -> str | None:
            return next((line for line in self.stderr[since:] if expression.search(line)), None)

        def is_over() -> bool:
            return matching() is not None or self._open_streams == 0

        try:
            async with asyncio.timeout(timeout_s), self._output_moved:
                await self._output_moved.wait_for(is_over)
        except TimeoutError:
            pass
        line = matching()
        if line is None:
            raise AssertionError(f"no log line with {pattern!r}\n{self.output}")
        return line

    async def wait_until_ready(self, *, path: str = "/readyz", timeout_s: float = 30.0) -> None:
        """Wait until `path` of its HTTP server answers 200."""
        process = self._running()
        answer = "no answer"
        try:
            async with asyncio.timeout(timeout_s), httpx.AsyncClient(trust_env=False) as client:
                while process.returncode is None:
                    try:
                        response = await client.get(f"{self.http_url}{path}")
                    except httpx.TransportError:
                        pass
                    else:
                        if response.status_code == 200:
                            return
                        answer = f"{response.status_code} {response.text}"
                    await asyncio.sleep(0.02)
        except TimeoutError:
            pass
        else:
            await self.wait()
        raise AssertionError(f"{path} did not answer 200 but {answer}\n{self.output}")

    async def wait(self, *, timeout_s: float = 60.0) -> int:
        """Wait for its end and all its output; the exit code, negative for a signal."""
        try:
            async with asyncio.timeout(timeout_s):
                code = await self._running().wait()
                await asyncio.gather(*self._readers)
        except TimeoutError:
            raise AssertionError(f"the relay did not end in {timeout_s} s\n{self.output}") from None
        return code

    def send_signal(self, number: signal.Signals) -> None:
        self._running().send_signal(number)

    async def terminate(self, *, timeout_s: float = 60.0) -> int:
        """SIGTERM and wait; the exit code."""
        self.send_signal(signal.SIGTERM)
        return await self.wait(timeout_s=timeout_s)

    async def kill(self) -> None:
        """SIGKILL and wait until it is gone."""
        if self._running().returncode is None:
            self.send_signal(signal.SIGKILL)
        await self.wait()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._running().returncode

    async def aclose(self) -> None:
        """Leave no process behind, whatever state it is in."""
        if self._process is not None:
            await self.kill()

    async def _collect(self, stream: asyncio.StreamReader, lines: list[str]) -> None:
        try:
            async for line in stream:
                lines.append(line.decode(errors="replace").rstrip("\n"))
                async with self._output_moved:
                    self._output_moved.notify_all()
        finally:
            self._open_streams -= 1
            async with self._output_moved:
                self._output_moved.notify_all()

    def _running(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "the relay was not started"
        return self._process
