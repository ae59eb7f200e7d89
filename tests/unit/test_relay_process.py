"""The process fixture's own promises, shown with a small server of the standard library."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.servers.finding import free_port
from tests.servers.process import RelayProcess


@pytest.fixture
async def web_server(tmp_path: Path) -> AsyncIterator[RelayProcess]:
    """`python -m http.server`: it logs every request to stderr and answers 200 on /."""
    port = free_port()
    process = RelayProcess(
        [str(port), "--bind", "127.0.0.1"],
        {**os.environ, "PYTHONUNBUFFERED": "1"},
        tmp_path,
        port,
        module="http.server",
    )
    await process.start()
    yield process
    await process.aclose()


async def test_readiness_and_log_lines_are_awaited(web_server: RelayProcess) -> None:
    await web_server.wait_until_ready(path="/")

    line = await web_server.wait_for_log(r'"GET / HTTP/1\.\d" 200')

    assert "GET /" in line
    assert web_server.returncode is None


async def test_a_killed_process_ends_with_its_signal_and_keeps_its_output(
    web_server: RelayProcess,
) -> None:
    await web_server.wait_until_ready(path="/")

    await web_server.kill()

    assert web_server.returncode == -9
    assert any("Serving HTTP" in line for line in web_server.stdout)


async def test_a_terminated_process_gives_its_exit_code(web_server: RelayProcess) -> None:
    await web_server.wait_until_ready(path="/")

    assert await web_server.terminate() == -15


async def test_a_line_that_never_comes_ends_with_the_output_when_the_process_ends(
    web_server: RelayProcess,
) -> None:
    await web_server.wait_until_ready(path="/")
    waiting = asyncio.create_task(web_server.wait_for_log("never said"))

    await web_server.kill()

    with pytest.raises(AssertionError, match="GET /"):
        await waiting


async def test_a_page_that_is_not_there_is_not_ready(web_server: RelayProcess) -> None:
    await web_server.wait_until_ready(path="/")

    with pytest.raises(AssertionError, match="404"):
        await web_server.wait_until_ready(path="/missing", timeout_s=0.3)


async def test_a_process_that_cannot_start_fails_at_once(tmp_path: Path) -> None:
    process = RelayProcess([], os.environ, tmp_path, free_port(), module="no_such_module")
    await process.start()

    with pytest.raises(AssertionError, match="No module named no_such_module"):
        await process.wait_until_ready()

    assert await process.wait() == 1
