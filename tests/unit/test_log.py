"""Logs: their two formats, what they hide, what a slow terminal costs, and what events say."""

from __future__ import annotations

import ast
import io
import json
import logging
import pty
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import relay
from relay.errors import ErrorKind
from relay.events import (
    BatchAcknowledged,
    BatchPublished,
    ClaimCheckFetched,
    ConnectionChanged,
    DatabaseChanged,
    DeadLettered,
    DeadLettersRetried,
    OwnershipChanged,
    PipelineDescribed,
    PipelineState,
    Polled,
    Retried,
    Side,
    StateChanged,
)
from relay.log import FIELDS, RING_ENTRIES, EventLog, LogEntry, Logs, configure
from relay.settings import LogSettings

SECRET = "hunter22"
JSON = LogSettings(format="json", level="debug")
TEXT = LogSettings(format="text", level="debug")

Start = Callable[[LogSettings], Logs]


def _mask(text: str) -> str:
    return text.replace(SECRET, "******")


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def start(stream: io.StringIO) -> Iterator[Start]:
    started: list[Logs] = []

    def start_logs(settings: LogSettings) -> Logs:
        started.append(configure(settings, _mask, stream=stream))
        return started[-1]

    yield start_logs
    for logs in started:
        logs.close()


def _lines(logs: Logs, stream: io.StringIO) -> list[dict[str, object]]:
    logs.close()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.shows("setting:log.format")
def test_json_is_one_object_a_line_with_the_known_fields(start: Start, stream: io.StringIO) -> None:
    logs = start(JSON)

    logging.getLogger("relay.x").warning(
        "failed %d times", 3, extra={"pipeline": "p", "attempt": 3, "error": 'a "b"\nc'}
    )

    (line,) = _lines(logs, stream)
    assert str(line.pop("ts")).endswith("Z")
    assert line == {
        "level": "warning",
        "msg": "failed 3 times",
        "pipeline": "p",
        "attempt": 3,
        "error": 'a "b"\\nc',
        "logger": "relay.x",
    }


def test_text_has_time_level_pipeline_message_and_fields_in_order(
    start: Start, stream: io.StringIO
) -> None:
    logs = start(TEXT)

    logging.getLogger("relay").info(
        "said", extra={"error": "two words", "sink": "nats", "pipeline": "p", "delay_s": 1.5}
    )

    logs.close()
    assert stream.getvalue()[23:] == ' INFO     [p] said sink=nats delay_s=1.5 error="two words"\n'


def test_the_logger_of_a_library_is_named_in_text(start: Start, stream: io.StringIO) -> None:
    logs = start(TEXT)

    logging.getLogger("nats.aio").warning("slow consumer")

    logs.close()
    assert "WARNING  nats.aio: slow consumer" in stream.getvalue()


@pytest.mark.parametrize("settings", [TEXT, JSON])
def test_a_secret_is_masked_in_message_fields_and_traceback(
    start: Start, stream: io.StringIO, settings: LogSettings
) -> None:
    logs = start(settings)

    try:
        try:
            raise ValueError(f"inner {SECRET}")
        except ValueError as error:
            raise ExceptionGroup(f"outer {SECRET}", [error]) from error
    except ExceptionGroup:
        logging.getLogger("relay").exception("with %s", SECRET, extra={"error": SECRET})

    logs.close()
    assert SECRET not in stream.getvalue()
    assert stream.getvalue().count("******") >= 4
    assert all(SECRET not in str(entry) for entry in logs.entries())


def test_a_field_that_is_not_on_the_list_is_left_out(start: Start, stream: io.StringIO) -> None:
    logs = start(JSON)

    logging.getLogger("relay").info("x", extra={"payload": '{"card": 4111}', "sink": "nats"})

    (line,) = _lines(logs, stream)
    assert "4111" not in json.dumps(line)
    assert line["sink"] == "nats"


def test_every_extra_that_the_relay_passes_is_on_the_list() -> None:
    passed = set()
    for path in Path(relay.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "extra":
                passed |= {
                    key.value
                    for inner in ast.walk(node.value)
                    if isinstance(inner, ast.Dict)
                    for key in inner.keys
                    if isinstance(key, ast.Constant)
                }

    assert passed <= set(FIELDS)


def test_a_traceback_shows_frames_and_only_the_first_line_of_an_error(
    start: Start, stream: io.StringIO
) -> None:
    logs = start(JSON)

    try:
        raise ValueError("duplicate key\nDETAIL: Key (card)=(4111) already exists.")
    except ValueError:
        logging.getLogger("relay").exception("unexpected")

    (line,) = _lines(logs, stream)
    trace = line["trace"]
    assert isinstance(trace, list)
    assert trace[-1] == "ValueError: duplicate key"
    assert "test_log.py" in trace[0]
    assert "4111" not in json.dumps(line)


def test_control_characters_and_lone_surrogates_can_not_forge_a_line(
    start: Start, stream: io.StringIO
) -> None:
    logs = start(TEXT)

    logging.getLogger("relay").info("a\nb\x1b[31m\u2028\ud800")

    logs.close()
    assert stream.getvalue().splitlines()[0].endswith(r"a\nb\x1b[31m\u2028\ud800")


def test_an_endless_text_is_cut(start: Start, stream: io.StringIO) -> None:
    logs = start(JSON)

    logging.getLogger("relay").info("%s", "x" * 1_000_000)

    (line,) = _lines(logs, stream)
    assert str(line["msg"]).endswith("… (1000000 characters)")
    assert len(str(line["msg"])) < 2_100


def test_a_wrong_log_call_costs_only_its_own_text(start: Start, stream: io.StringIO) -> None:
    logs = start(JSON)

    logging.getLogger("relay").info("%d", "not a number")
    logging.getLogger("relay").info("next")

    first, second = _lines(logs, stream)
    assert first["msg"] == "a log record could not be written: TypeError"
    assert second["msg"] == "next"


@pytest.mark.shows("setting:log.level")
def test_the_level_hides_what_is_below_it(start: Start, stream: io.StringIO) -> None:
    logs = start(LogSettings(format="json", level="warning"))

    logging.getLogger("relay").info("hidden")
    logging.getLogger("relay").warning("shown")

    assert [line["msg"] for line in _lines(logs, stream)] == ["shown"]


@pytest.mark.parametrize("library", ["hydra", "nats", "aiokafka", "botocore", "httpx", "aiohttp"])
def test_libraries_speak_from_warnings_on_even_at_debug(
    start: Start, stream: io.StringIO, library: str
) -> None:
    logs = start(JSON)

    logging.getLogger(f"{library}.inner").info("hidden")
    logging.getLogger(f"{library}.inner").warning("shown")

    assert [line["msg"] for line in _lines(logs, stream)] == ["shown"]


def test_libraries_are_not_louder_than_the_level(start: Start, stream: io.StringIO) -> None:
    logs = start(LogSettings(format="json", level="error"))

    logging.getLogger("nats").warning("hidden")

    assert _lines(logs, stream) == []


def test_there_is_no_second_format_beside_it(
    start: Start, stream: io.StringIO, capfd: pytest.CaptureFixture[str]
) -> None:
    foreign = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(foreign)
    try:
        logs = start(JSON)
        logging.getLogger("relay").info("once")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old", stacklevel=1)
        messages = [str(line["msg"]) for line in _lines(logs, stream)]
    finally:
        logging.getLogger().removeHandler(foreign)

    assert messages[0] == "once"
    assert "UserWarning: old" in messages[1]
    assert capfd.readouterr().err == ""


def test_closing_gives_logging_back_as_it_was(start: Start) -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level, logging.getLogger("nats").level)

    logs = start(JSON)
    logs.close()
    logs.close()

    assert (root.handlers, root.level, logging.getLogger("nats").level) == before


def test_the_ring_keeps_the_last_entries(start: Start) -> None:
    logs = start(JSON)

    for number in range(RING_ENTRIES + 10):
        logging.getLogger("relay").info("%d", number)

    kept = logs.entries()
    assert [kept[0].message, kept[-1].message] == ["10", str(RING_ENTRIES + 9)]


def test_while_a_view_is_up_only_the_ring_is_written(start: Start, stream: io.StringIO) -> None:
    logs = start(JSON)

    logs.show_on_stderr(shown=False)
    logging.getLogger("relay").info("to the ring")
    logs.show_on_stderr(shown=True)
    logging.getLogger("relay").info("to both")

    assert [line["msg"] for line in _lines(logs, stream)] == ["to both"]
    assert [entry.message for entry in logs.entries()] == ["to the ring", "to both"]


class Stalled(io.StringIO):
    """A terminal that takes nothing until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def write(self, text: str) -> int:
        self.reached.set()
        assert self.go_on.wait(30)
        return super().write(text)


def test_a_stalled_terminal_costs_lines_that_are_counted_and_no_time() -> None:
    stalled = Stalled()
    logs = configure(JSON, _mask, stream=stalled)
    try:
        logging.getLogger("relay").info("first")
        assert stalled.reached.wait(5)

        for number in range(10_500):
            logging.getLogger("relay").info("%d", number)

        assert logs.dropped == 500
        stalled.go_on.set()
    finally:
        logs.close()
    messages = [json.loads(line)["msg"] for line in stalled.getvalue().splitlines()]
    assert "500 log entries were dropped: standard error does not keep up" in messages
    assert len(messages) == 10_002


def test_a_closed_stream_does_no_harm(start: Start, stream: io.StringIO) -> None:
    logs = start(JSON)
    stream.close()

    logging.getLogger("relay").info("nobody reads this")
    logs.close()

    assert logs.dropped == 1
    assert logs.entries()[-1].message == "nobody reads this"


def test_what_is_queued_at_exit_is_written() -> None:
    program = textwrap.dedent("""
        import logging
        from relay.log import configure
        from relay.settings import LogSettings
        configure(LogSettings(format="json"), str)
        for number in range(3000):
            logging.getLogger("relay").info("%d", number)
    """)

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )

    assert [json.loads(line)["msg"] for line in done.stderr.splitlines()] == [
        str(number) for number in range(3000)
    ]
    assert done.stdout == ""


@pytest.mark.parametrize(
    "environment, coloured", [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colour_is_for_terminals_that_want_it(
    monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], coloured: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    reader, terminal = pty.openpty()
    with open(terminal, "w") as stream, open(reader, "rb", buffering=0) as seen:  # noqa: PTH123
        logs = configure(TEXT, _mask, stream=stream)
        logging.getLogger("relay").error("oh")
        logs.close()
        written = seen.read(1000)

    assert (b"\x1b[31mERROR   \x1b[0m oh" in written) is coloured


def test_no_colour_goes_into_a_pipe(start: Start, stream: io.StringIO) -> None:
    logs = start(TEXT)

    logging.getLogger("relay").error("oh")

    logs.close()
    assert "\x1b" not in stream.getvalue()


class Told:
    """An event log with a clock in our hands; `lines` are what it has written."""

    def __init__(self, logs: Logs) -> None:
        self.logs = logs
        self.clock_s = 0.0
        self.log = EventLog(60.0, clock=lambda: self.clock_s)

    def described(self, settings: Mapping[str, object] | None = None) -> None:
        self.log(
            PipelineDescribed(
                pipeline="p",
                direction="forward",
                source="outbox",
                sink="nats",
                settings=dict(settings or {}),
            )
        )

    def state(self, state: PipelineState, reason: str = "") -> None:
        self.log(StateChanged(pipeline="p", direction="forward", state=state, reason=reason))

    def retried(self, error: str = "refused", attempt: int = 1, side: Side = "sink") -> None:
        self.state(PipelineState.RETRYING, error)
        self.log(
            Retried(
                pipeline="p",
                direction="forward",
                side=side,
                attempt=attempt,
                delay_s=1.0,
                kind=ErrorKind.OUTAGE,
                error=error,
            )
        )

    def polled(self, messages: int) -> None:
        self.log(
            Polled(
                pipeline="p",
                direction="forward",
                messages=messages,
                rejected=0,
                full_refresh=False,
                duration_s=0.1,
            )
        )

    def published(self) -> None:
        self.log(
            BatchPublished(
                pipeline="p",
                direction="forward",
                messages=5,
                duplicates=1,
                dead_lettered=0,
                duration_s=0.1,
                attempts=1,
            )
        )

    def acknowledged(self) -> None:
        self.log(BatchAcknowledged(pipeline="p", direction="forward", messages=5, checkpoint="17"))

    def dead_lettered(self, error: str) -> None:
        self.log(
            DeadLettered(
                pipeline="p",
                direction="forward",
                messages=1,
                kind=ErrorKind.MESSAGE,
                error=error,
            )
        )

    def connected(self, side: Side, *, is_connected: bool) -> None:
        self.log(
            ConnectionChanged(
                pipeline="p", direction="forward", side=side, is_connected=is_connected
            )
        )

    def entries(self, level: str | None = None) -> Sequence[LogEntry]:
        return [
            entry
            for entry in self.logs.entries()
            if (entry.level != "debug" if level is None else entry.level == level)
        ]

    @property
    def lines(self) -> list[str]:
        return [entry.message for entry in self.entries()]


@pytest.fixture
def told(start: Start) -> Told:
    return Told(start(JSON))


def test_the_life_of_a_pipeline_is_told_with_what_it_connects(told: Told) -> None:
    told.described()
    told.state(PipelineState.STARTING)
    told.connected("source", is_connected=True)
    told.connected("sink", is_connected=True)
    told.state(PipelineState.RUNNING)
    told.connected("source", is_connected=False)
    told.state(PipelineState.STOPPED)

    assert told.lines == [
        "starting",
        "source connected",
        "sink connected",
        "running",
        "source disconnected",
        "stopped",
    ]
    assert told.entries()[0].fields == {
        "pipeline": "p",
        "direction": "forward",
        "source": "outbox",
        "sink": "nats",
        "state": "starting",
    }


def test_a_connection_that_was_never_made_is_not_told_lost(told: Told) -> None:
    told.connected("source", is_connected=False)

    assert told.lines == []


def test_stopped_is_told_once(told: Told) -> None:
    told.state(PipelineState.STOPPED)
    told.state(PipelineState.STOPPED)

    assert told.lines == ["stopped"]


def test_a_failure_is_told_with_side_attempt_delay_kind_and_error(told: Told) -> None:
    told.retried("refused", attempt=4)

    (entry,) = told.entries()
    assert (entry.level, entry.message) == ("warning", "sink failed, trying again")
    assert entry.fields == {
        "pipeline": "p",
        "direction": "forward",
        "side": "sink",
        "attempt": 4,
        "delay_s": 1.0,
        "kind": "outage",
        "error": "refused",
    }


@pytest.mark.shows("setting:log.repeat_s")
def test_a_repeated_error_is_told_once_and_then_summed_up(told: Told) -> None:
    for attempt in range(1, 19):
        told.retried("refused by 10.0.0.1:4222", attempt=attempt)
        told.clock_s += 3.0
    assert told.lines == ["sink failed, trying again"]

    told.clock_s = 60.0
    told.polled(1)

    assert told.lines[1:] == ["sink failed, trying again: repeated 17 times in 60 s"]
    assert told.entries()[1].fields["repeated"] == 17
    assert told.entries()[1].fields["attempt"] == 18


def test_after_the_sum_the_next_like_error_is_told_again(told: Told) -> None:
    told.retried()
    told.clock_s = 61.0
    told.retried()

    assert told.lines == ["sink failed, trying again", "sink failed, trying again"]


def test_errors_that_differ_only_in_numbers_are_one_error(told: Told) -> None:
    for number in range(100):
        told.dead_lettered(f"event orders:{number} is too large")

    assert told.lines == ["dead-lettered"]


def test_different_errors_are_told_each(told: Told) -> None:
    told.retried("refused")
    told.retried("timed out")
    told.retried("refused", side="source")

    assert [entry.fields["error"] for entry in told.entries()] == [
        "refused",
        "timed out",
        "refused",
    ]


def test_a_flood_of_different_errors_is_remembered_within_bounds(told: Told) -> None:
    for number in range(1_500):
        letters = "".join(chr(ord("a") + int(digit)) for digit in str(number))
        told.dead_lettered(f"rejected {letters}")

    assert len(told.log._repeats) == 1_000


def test_recovery_is_told_once_something_moves_and_not_by_a_mere_connection(told: Told) -> None:
    told.described()
    told.state(PipelineState.STARTING)
    told.state(PipelineState.RUNNING)
    for _ in range(3):
        told.retried()
        told.connected("sink", is_connected=True)
        told.state(PipelineState.RUNNING)
        told.connected("sink", is_connected=False)
        told.clock_s += 4.0
    assert told.lines == ["starting", "running", "sink failed, trying again"]

    told.acknowledged()

    assert told.lines[3:] == ["delivering again after 3 failures in 12 s"]


def test_an_idle_poll_of_a_running_pipeline_is_a_recovery_too(told: Told) -> None:
    told.retried()
    told.polled(0)
    assert told.lines == ["sink failed, trying again"]

    told.state(PipelineState.RUNNING)
    told.polled(0)

    assert told.lines[1:] == ["delivering again after 1 failure in 0 s"]


@pytest.mark.parametrize("state", [PipelineState.FAILED, PipelineState.SUSPENDED])
def test_failed_and_suspended_are_errors_with_their_reason(
    told: Told, state: PipelineState
) -> None:
    told.state(state, "no such stream")

    (entry,) = told.entries("error")
    assert entry.message == state.value
    assert entry.fields["error"] == "no such stream"


def test_a_dead_letter_is_an_error_with_kind_and_reason(told: Told) -> None:
    told.dead_lettered("too large")

    (entry,) = told.entries("error")
    assert (entry.message, entry.fields["kind"]) == ("dead-lettered", "message")
    assert entry.fields["error"] == "too large"


def test_retried_dead_letters_are_told_unless_there_were_none(told: Told) -> None:
    told.log(DeadLettersRetried(pipeline="p", direction="forward", delivered=0, failed=0))
    told.log(DeadLettersRetried(pipeline="p", direction="forward", delivered=2, failed=1))

    (entry,) = told.entries("info")
    assert (entry.fields["delivered"], entry.fields["failed"]) == (2, 1)


def test_batches_are_told_at_debug_only(told: Told) -> None:
    told.polled(5)
    told.published()
    told.acknowledged()
    told.log(ClaimCheckFetched(pipeline="p", direction="forward", rows=1000))
    assert told.lines == []

    debug = told.entries("debug")

    assert [entry.message for entry in debug] == [
        "polled",
        "published",
        "acknowledged",
        "claim check fetched",
    ]
    assert debug[2].fields["checkpoint"] == "17"


def test_idle_polls_are_not_told_at_all(told: Told) -> None:
    told.polled(0)

    assert told.entries("debug") == []


def test_ownership_is_told_with_what_was_taken_and_given_up(told: Told) -> None:
    told.log(OwnershipChanged(pipelines=["a", "b"], members=1))
    told.log(OwnershipChanged(pipelines=["a", "b"], members=1))
    told.log(OwnershipChanged(pipelines=["b", "c"], members=2))
    told.log(OwnershipChanged(pipelines=["c"], members=2))

    assert told.lines == [
        "2 pipelines run here; took a, b",
        "2 pipelines run here; took c; gave up a",
        "1 pipeline runs here; gave up b",
    ]
    assert told.entries()[1].fields == {"members": 2}


def test_a_lost_database_is_told_once_and_its_return_always(told: Told) -> None:
    told.log(DatabaseChanged(is_connected=True))
    for _ in range(4):
        told.log(DatabaseChanged(is_connected=False, reason="refused"))
    told.log(DatabaseChanged(is_connected=True))

    assert told.lines == [
        "the database is connected",
        "the database is lost, no pipeline runs",
        "the database is lost, no pipeline runs: repeated 3 times in 0 s",
        "the database is connected",
    ]


def test_a_restart_is_told_in_full_even_within_the_time_of_repeats(told: Told) -> None:
    for _ in range(2):
        told.described()
        told.state(PipelineState.FAILED, "no such stream")
        told.state(PipelineState.STOPPED)

    assert told.lines == ["failed", "stopped", "failed", "stopped"]


def test_another_try_with_the_same_configuration_is_a_repetition(told: Told) -> None:
    for _ in range(2):
        told.described({"stream": "A"})
        told.state(PipelineState.FAILED, "no such stream")
    assert told.lines == ["failed"]

    told.described({"stream": "B"})
    told.state(PipelineState.FAILED, "no such stream")

    assert told.lines[1:] == ["failed: repeated 1 times in 0 s", "failed"]


def test_closing_sums_up_what_was_not_told_yet(told: Told) -> None:
    told.retried()
    told.retried()

    told.log.close()

    assert told.lines[-1] == "sink failed, trying again: repeated 1 times in 0 s"
