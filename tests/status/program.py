"""A process that shows the view and nothing else, for tests that own its terminal.

`python -m tests.status.program WAY FILE`: WAY is how it ends (`quit`: by the user or a signal;
`stop`: the same, and with it a relay;
`raise`: by an exception as soon as a file FILE.raise is there). Into FILE it writes, again and
again, what it was told and how often its event loop came round.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from pathlib import Path

import msgspec

from relay.settings import UiSettings
from relay.status import Key, StatusView
from tests.status.scene import Log, RecordingFleet


async def main(way: str, report: Path) -> None:
    closed = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, closed.set)
    watched = RecordingFleet()
    beats = 0
    trigger = report.with_suffix(".raise")

    def banner() -> list[str]:
        # Whole screens that change, so that a few fill what the kernel keeps for a terminal.
        return [f"{time.monotonic_ns()} " * 9] * 50 if way == "busy" else []

    async def shout() -> str:
        watched.told.append("shout")
        return "it was loud"

    settings = UiSettings(mode="tui", refresh_ms=20)
    async with StatusView(
        watched,
        Log(),
        settings,
        on_quit=closed.set,
        on_lost=closed.set,
        banner=banner,
        keys={Key(key="x", label="shout", help="loudly"): shout},
        stops_relay=way == "stop",
    ):
        while not closed.is_set():
            beats += 1
            partial = report.with_suffix(".partial")
            partial.write_bytes(msgspec.json.encode({"told": watched.told, "beats": beats}))
            partial.rename(report)
            if way == "raise" and trigger.exists():
                raise RuntimeError("as asked")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    await closed.wait()


asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
