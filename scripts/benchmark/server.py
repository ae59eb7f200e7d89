"""Servers as child processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from relay.demo.embedded import LOOPBACK

START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 60.0

_REPOSITORY: Final = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port of the loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def running_server(
    command: Sequence[str | Path],
    directory: Path,
    port: int,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[None]:
    """The process, from when it accepts connections on its port to the end of the block.

    ``environment``: variables besides ours. Raises `RuntimeError` with what it said when it ends
    or stays silent instead.
    """
    log = directory / "server.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=directory,
            env={**os.environ, **(environment or {})},
        )
    try:
        await _until_up(process, port, log)
        yield
    finally:
        await stopped(process)


@contextlib.asynccontextmanager
async def running_module(module: str) -> AsyncIterator[int]:
    """A module of the benchmarks as a server in a process of its own, gone at the end; its port.

    The port is its one argument.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="pgtrickle-bench-") as directory:
        command = [sys.executable, "-m", module, str(port)]
        async with running_server(command, Path(directory), port, {"PYTHONPATH": str(_REPOSITORY)}):
            yield port


async def until_accepting(port: int) -> None:
    """Wait, without a bound, until somebody accepts connections there."""
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(LOOPBACK, port)
            writer.close()
            return
        await asyncio.sleep(0.02)


async def stopped(process: asyncio.subprocess.Process) -> None:
    """End it in order; killed where it does not obey."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _until_up(process: asyncio.subprocess.Process, port: int, log: Path) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_TIMEOUT_S):
            accepting = asyncio.create_task(until_accepting(port))
            ended = asyncio.create_task(process.wait())
            try:
                await asyncio.wait((accepting, ended), return_when=asyncio.FIRST_COMPLETED)
            finally:
                accepting.cancel()
                ended.cancel()
            if accepting.done() and process.returncode is None:
                return
    said = await asyncio.to_thread(log.read_text, errors="replace")
    raise RuntimeError(f"{process.pid} does not accept connections:\n{said}")
