from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from tests.status.emulator import BOUND_S, REPOSITORY, Emulator

Start = Callable[..., Emulator]


class Report(msgspec.Struct):
    """What the program under test says of itself."""

    told: list[str]
    beats: int


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return tmp_path / "report"


@pytest.fixture
def start(report: Path) -> Iterator[Start]:
    """Start the program with the view in a terminal of its own and wait for its first screen."""
    emulators: list[Emulator] = []

    def started(
        way: str = "quit",
        *,
        columns: int = 80,
        lines: int = 24,
        environment: dict[str, str] | None = None,
    ) -> Emulator:
        emulator = Emulator(
            "tests.status.program",
            [way, str(report)],
            columns=columns,
            lines=lines,
            environment=environment,
        )
        emulators.append(emulator)
        emulator.until_shown("orders-to-nats", "q stop" if way == "stop" else "q quit")
        return emulator

    yield started
    for emulator in emulators:
        emulator.close()


def test_arrows_move_and_enter_and_escape_open_and_close_the_details(start: Start) -> None:
    terminal = start()

    terminal.until_shown("▸! invoices-from-nats")
    terminal.type("\x1b[B")
    terminal.until_shown("▸  audit-to-file")
    terminal.type("j\r")
    terminal.until_shown("▸  orders-to-nats", "p50 3.0ms", "source.outbox: orders")
    terminal.type("\x1b[H")
    terminal.until_shown("5 dead letters", "id 17", "total_is_positive")
    terminal.type("\x1b")
    terminal.until_gone("id 17")


def test_a_filter_leaves_what_matches_until_it_is_dropped(start: Start) -> None:
    terminal = start()

    terminal.type("/invoi")
    terminal.until(lambda screen: "filter: invoi" in screen and "outbox→nats" not in screen)
    terminal.type("\r")
    terminal.until_shown("filter: invoi (esc drops it)")
    terminal.type("\x1b")
    terminal.until_shown("▸! invoices-from-nats", "audit-to-file")


def test_s_sorts_by_the_next_column(start: Start) -> None:
    terminal = start()

    terminal.type("ss")

    terminal.until(lambda screen: "rate*" in screen and "orders" in screen.splitlines()[5])


def test_pausing_asks_first_and_resuming_too(start: Start, report: Path) -> None:
    terminal = start()
    terminal.type("\x1b[F")
    terminal.until_shown("▸  orders-to-nats")

    terminal.type("p")
    terminal.until_shown("pause orders-to-nats?")
    terminal.type("y")
    terminal.until_shown("orders-to-nats is paused")
    terminal.type("p")
    terminal.until_shown("resume orders-to-nats?")
    terminal.type("y")
    terminal.until_shown("orders-to-nats is resumed")

    _until(report, lambda seen: seen.told == ["pause orders-to-nats", "resume orders-to-nats"])


def test_any_answer_but_yes_changes_nothing(start: Start, report: Path) -> None:
    terminal = start()

    terminal.type("p")
    terminal.until_shown("pause invoices-from-nats?")
    terminal.type("n")
    terminal.until_gone("pause invoices-from-nats?")

    beats = _read(report).beats
    assert _until(report, lambda seen: seen.beats > beats + 2).told == []


def test_an_action_that_fails_is_one_line_on_the_screen(start: Start) -> None:
    terminal = start()

    terminal.type("jp")
    terminal.until_shown("resume audit-to-file?")
    terminal.type("y")

    terminal.until_shown("PostgreSQL is out of reach", "▸  audit-to-file")


def test_dead_letters_are_retried_where_there_are_some(start: Start, report: Path) -> None:
    terminal = start()

    terminal.type("jr")
    terminal.until_shown("audit-to-file has no dead letters")
    terminal.type("kr")
    terminal.until_shown("try 5 dead letters of invoices-from-nats again?")
    terminal.type("y")
    terminal.until_shown("5 dead letters are tried again")

    _until(report, lambda seen: seen.told == ["retry invoices-from-nats"])


def test_one_dead_letter_is_read_tried_again_and_its_outcome_told(
    start: Start, report: Path
) -> None:
    terminal = start()

    terminal.type("jd")
    terminal.until_shown("audit-to-file has no dead letters")
    terminal.type("kt")
    terminal.until_shown("select one of the dead letters with d")
    terminal.type("d")
    terminal.until_shown("id 17", "d reads one")
    terminal.type("d")
    terminal.until_shown("▸ 11:59:20 id 17", "then try it again")
    terminal.type("t")
    terminal.until_shown("try dead letter 17 of invoices-from-nats again?")
    terminal.type("y")
    terminal.until_shown("dead letter 17 was refused again: the total is still -1", "2 attempts")
    terminal.type("d")
    terminal.until_shown("▸ 11:20:00 id 12")
    terminal.type("ty")
    terminal.until_shown("dead letter 12 of invoices-from-nats is delivered")

    _until(report, lambda seen: seen.told == ["retry 17", "retry 12"])


def test_help_names_the_keys_and_any_key_goes_back(start: Start) -> None:
    terminal = start()

    terminal.type("?")
    terminal.until_shown(
        "pause: or resume the selected pipeline",
        "quit: the view; no relay is touched",
        "shout: loudly",
        "any key goes back",
    )
    terminal.type(" ")
    terminal.until_shown("▸! invoices-from-nats")


def test_the_screen_follows_a_resize(start: Start) -> None:
    terminal = start()
    assert "total" not in terminal.text

    terminal.resize(120, 40)
    wide = terminal.until_shown("total", "12,345", "q quit")
    assert "q quit" in wide.splitlines()[39]

    terminal.resize(80, 24)
    narrow = terminal.until(lambda screen: "total" not in screen and "q quit" in screen)
    assert "q quit" in narrow.splitlines()[23]


def test_without_colour_no_colour_is_written(start: Start) -> None:
    terminal = start(environment={"NO_COLOR": "1"})

    assert not re.search(rb"\x1b\[[0-9;]*3[0-7][;m]", terminal.output)


def test_a_screen_that_does_not_change_is_not_written_again(start: Start, report: Path) -> None:
    terminal = start()
    terminal.until_shown("up ")
    before = len(terminal.output)

    beats = _read(report).beats
    _until(report, lambda seen: seen.beats > beats + 20)
    terminal.until_shown("q quit")

    # Only the time that the relay has been up moves, once a minute.
    assert len(terminal.output) - before < 1000


def test_the_styles_of_the_screen_reach_the_terminal(start: Start) -> None:
    terminal = start()
    terminal.until_shown("failed, trying again")

    styles = terminal.styles

    assert "3:1-80 bold: pipeline" in styles
    assert re.search(r"^\d+:1-80 brown: 12:00:01 WARNING", styles, re.MULTILINE)
    assert "24:1-80 reverse: x shout" in styles


def test_a_key_of_who_shows_the_view_does_what_it_says(start: Start, report: Path) -> None:
    terminal = start()

    terminal.type("x")

    terminal.until_shown("it was loud")
    _until(report, lambda seen: seen.told == ["shout"])


def test_where_leaving_stops_the_relay_it_asks_first_and_says_so(start: Start) -> None:
    terminal = start("stop")

    terminal.type("?")
    terminal.until_shown("stop: this relay, and leave the view; asks first")
    terminal.type(" ")
    for back in ("n", "\x1b"):
        terminal.type("q")
        terminal.until_shown("Stop this relay?")
        terminal.type(back)
        terminal.until_shown("q stop")
    terminal.type("qy")

    assert terminal.wait() == 0
    _assert_restored(terminal)


def test_quitting_gives_the_terminal_back(start: Start) -> None:
    terminal = start()

    terminal.type("q")

    assert terminal.wait() == 0
    _assert_restored(terminal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_gives_the_terminal_back(start: Start, number: signal.Signals) -> None:
    terminal = start()

    terminal.signal(number)

    terminal.wait()
    _assert_restored(terminal)


def test_an_exception_gives_the_terminal_back(start: Start, report: Path) -> None:
    terminal = start("raise")

    report.with_suffix(".raise").touch()

    assert terminal.wait() == 1
    _assert_restored(terminal)
    assert b"RuntimeError: as asked" in terminal.output.rpartition(b"\x1b[?1049l")[2]


def test_a_view_that_can_not_begin_ends_alone(report: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.status.program", "quit", str(report)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=REPOSITORY,
        timeout=BOUND_S,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"the status view failed") == 1


def test_a_stalled_terminal_costs_frames_and_nothing_else(start: Start, report: Path) -> None:
    terminal = start("busy", columns=200, lines=60)

    # Nobody reads any more: the kernel's buffer is full after a few frames.
    beats = _read(report).beats
    _until(report, lambda seen: seen.beats > beats + 40)
    terminal.signal(signal.SIGTERM)

    terminal.wait(reads=False)
    assert terminal.attributes_after == terminal.attributes


def _assert_restored(terminal: Emulator) -> None:
    assert terminal.attributes_after == terminal.attributes
    assert terminal.output.count(b"\x1b[?1049h") == terminal.output.count(b"\x1b[?1049l") == 1
    assert b"\x1b[?25h" in terminal.output
    assert b"\x1b[?2026" not in terminal.output.rpartition(b"\x1b[?1049l")[2]


def _read(report: Path) -> Report:
    return msgspec.json.decode(report.read_bytes(), type=Report)


def _until(report: Path, condition: Callable[[Report], bool]) -> Report:
    deadline = time.monotonic() + BOUND_S
    while not condition(seen := _read(report)):
        assert time.monotonic() < deadline, f"it stayed {seen}"
        time.sleep(0.01)
    return seen
