"""A process that shows the status view for a while, for tests that own its terminal.

`python -m tests.effects.ui_program REFRESH_MS FILE`: how often it drew in one second goes to FILE.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from relay.settings import UiSettings
from relay.status import StatusView
from tests.status.scene import Log, RecordingFleet


async def drawn_in_a_second(refresh_ms: int) -> int:
    drawn = 0

    def banner() -> list[str]:
        nonlocal drawn
        drawn += 1
        return [f"drawn {drawn}"]

    settings = UiSettings(mode="tui", refresh_ms=refresh_ms)
    async with StatusView(
        RecordingFleet(), Log(), settings, on_quit=_nothing, on_lost=_nothing, banner=banner
    ):
        await asyncio.sleep(1)
    return drawn


def _nothing() -> None:
    """Nobody closes it."""


Path(sys.argv[2]).write_text(str(asyncio.run(drawn_in_a_second(int(sys.argv[1])))))
