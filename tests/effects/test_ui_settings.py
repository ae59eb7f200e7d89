"""The settings of the status view, in a terminal."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.servers.postgres import Database
from tests.status.emulator import Emulator

ALTERNATE_SCREEN = b"\x1b[?1049h"


@pytest.mark.shows("setting:ui.mode")
@pytest.mark.parametrize("mode,first_words", [("tui", "q stop"), ("none", "database")])
def test_the_view_is_shown_where_it_is_asked_for(
    migrated_database: Database, mode: str, first_words: str
) -> None:
    relay = Emulator("relay", ["+env=test", f"ui={mode}", "--postgres-url", migrated_database.dsn])
    try:
        relay.until_shown(first_words)
        relay.signal(signal.SIGTERM)
        code = relay.wait()
    finally:
        relay.close()

    assert code == 0
    assert (ALTERNATE_SCREEN in relay.output) is (mode == "tui")


@pytest.mark.shows("setting:ui.refresh_ms")
def test_the_view_is_drawn_so_often(tmp_path: Path) -> None:
    def drawn(refresh_ms: int) -> int:
        report = tmp_path / f"{refresh_ms}"
        program = Emulator("tests.effects.ui_program", [str(refresh_ms), str(report)])
        try:
            assert program.wait() == 0
        finally:
            program.close()
        return int(report.read_text())

    often, seldom = drawn(20), drawn(500)

    assert seldom <= 4
    assert often > 2 * seldom


def test_leaving_the_view_of_a_relay_stops_it_after_a_yes(migrated_database: Database) -> None:
    relay = Emulator("relay", ["+env=test", "ui=tui", "--postgres-url", migrated_database.dsn])
    try:
        relay.until_shown("q stop", "database connected")
        relay.type("q")
        relay.until_shown("Stop this relay?")
        relay.type("n")
        relay.until_shown("q stop", "database connected")
        relay.type("qy")

        assert relay.wait() == 0
    finally:
        relay.close()
