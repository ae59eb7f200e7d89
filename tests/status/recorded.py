"""Screens with their styles, as files. `python -m tests.status.recorded` writes them again."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pyte
from rich.color import ColorSystem

from relay.status import Fleet
from relay.status.screen import Mode, Renderer, Scene, ViewState
from tests.status.emulator import styles_of
from tests.status.scene import DEAD_LETTERS, FLEET, HEALTHY, PAUSED, TROUBLED, fleet_of, scene

DIRECTORY = Path(__file__).parent / "screens"
SIZES = ((80, 24), (120, 36), (200, 50))

_TWO_RELAYS = Fleet(
    relays=[
        *fleet_of(
            *(msgspec.structs.replace(HEALTHY, name=f"tenant-{n:02}-to-nats") for n in range(30)),
        ).relays,
        *fleet_of(
            *(
                msgspec.structs.replace(HEALTHY, name=f"tenant-{n:02}-to-nats")
                for n in range(30, 60)
            ),
            TROUBLED,
            worker_id="worker-b",
        ).relays,
    ],
    catalog=[PAUSED],
    lags=FLEET.lags,
)
SCENES: Mapping[str, Scene] = {
    "table": scene(),
    "details": scene(ViewState(is_open=True)),
    "letter": scene(ViewState(is_open=True, letter=DEAD_LETTERS[0].id)),
    "crowded": scene(fleet=_TWO_RELAYS),
    "question": scene(ViewState(mode=Mode.CONFIRM, question="Stop this relay?")),
    "banner": scene(banner=["What this is, and what to try.", "written 12   received 10"]),
}


def recorded(name: str, width: int, height: int) -> Path:
    """The file of a screen; beside it, with another suffix, its styles."""
    return DIRECTORY / f"{name}-{width}x{height}.txt"


def shown(name: str, width: int, height: int) -> tuple[str, str]:
    """A screen as a terminal shows it now: its text and its styles."""
    screen = pyte.Screen(width, height)
    stream = pyte.Stream(screen)
    renderer = Renderer(colours=ColorSystem.STANDARD, is_unicode=True)
    for row, line in enumerate(renderer.render(SCENES[name], width, height), 1):
        stream.feed(f"\x1b[{row};1H{line}\x1b[0m")
    return "".join(f"{line.rstrip()}\n" for line in screen.display), styles_of(screen)


if __name__ == "__main__":
    os.environ["TZ"] = "UTC"
    time.tzset()
    for name in SCENES:
        for size in SIZES:
            text, styles = shown(name, *size)
            recorded(name, *size).write_text(text, encoding="utf-8")
            recorded(name, *size).with_suffix(".styles").write_text(styles, encoding="utf-8")
