"""A receiver with nothing but aiohttp's server around it, in a process of its own.

It answers 200 as soon as it has read a request, and counts.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AbstractAsyncContextManager
from typing import Final

import httpx
import uvloop
from aiohttp import web

from relay.demo.embedded import LOOPBACK
from scripts.benchmark.server import running_module

_COUNT_PATH: Final = "/bench/count"


async def requests_at(port: int) -> int:
    """How many requests it has answered."""
    async with httpx.AsyncClient(trust_env=False) as client:
        return int((await client.get(f"http://{LOOPBACK}:{port}{_COUNT_PATH}")).text)


def aiohttp_receiver() -> AbstractAsyncContextManager[int]:
    """The receiver, gone at the end; its port."""
    return running_module("scripts.benchmark.bare_aiohttp")


async def _serve(port: int) -> None:
    answered = 0

    async def answer(request: web.BaseRequest) -> web.Response:
        nonlocal answered
        if request.path == _COUNT_PATH:
            return web.Response(text=str(answered))
        await request.read()
        answered += 1
        return web.Response()

    runner = web.ServerRunner(web.Server(answer, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, LOOPBACK, port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
