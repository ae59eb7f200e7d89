from __future__ import annotations

import re
import time
from collections.abc import Iterator

import msgspec
import pytest
from rich.color import ColorSystem

from relay.board import Latency
from relay.catalog import Backfill, Seek
from relay.events import PipelineState
from relay.status.fleet import Fleet, lines_of
from relay.status.screen import Key, Mode, Renderer, ViewState
from relay.status.table import Signs, Sort
from tests.status.recorded import SCENES, SIZES, recorded, shown
from tests.status.scene import (
    DEAD_LETTERS,
    FLEET,
    HEALTHY,
    NOW,
    PAUSED,
    TROUBLED,
    fleet_of,
    scene,
)

OPEN = ViewState(is_open=True, selected=("orders-to-nats", "worker-a"))

_COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|38;5;\d+|9[0-7])[;m]")


@pytest.fixture(autouse=True)
def _clock_in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def renderer() -> Renderer:
    return Renderer(colours=ColorSystem.STANDARD, is_unicode=True)


@pytest.mark.parametrize("width,height", SIZES)
@pytest.mark.parametrize("name", SCENES)
def test_a_screen_has_the_expected_text_and_styles(name: str, width: int, height: int) -> None:
    text, styles = shown(name, width, height)

    file = recorded(name, width, height)
    assert text == file.read_text(encoding="utf-8")
    assert styles == file.with_suffix(".styles").read_text(encoding="utf-8")


@pytest.mark.parametrize("size", [(80, 24), (81, 25), (109, 30), (110, 30), (200, 60), (20, 5)])
@pytest.mark.parametrize(
    "view", [ViewState(), OPEN, ViewState(mode=Mode.HELP), ViewState(filter="nothing")]
)
def test_every_line_fills_the_screen_exactly(
    renderer: Renderer, view: ViewState, size: tuple[int, int]
) -> None:
    width, height = size

    lines = renderer.draw(scene(view, banner=["x" * 300]), width, height)

    assert len(lines) == height
    assert {line.cell_len for line in lines} == {width}


def test_a_name_with_escape_sequences_does_not_reach_the_terminal(renderer: Renderer) -> None:
    wicked = msgspec.structs.replace(
        HEALTHY, name="\x1b]0;owned\x07", reason="\x9b31m", trouble="\r\nline", sink="\x1b[2J"
    )
    view = ViewState(is_open=True, filter="\x1b")

    lines = renderer.draw(scene(view, fleet_of(wicked)), 120, 40)

    assert not [c for line in lines for c in line.plain if not c.isprintable()]


def test_without_colours_the_selection_and_every_state_can_still_be_read() -> None:
    renderer = Renderer(colours=None, is_unicode=True)

    rendered = "\n".join(renderer.render(scene(), 80, 24))

    assert not _COLOUR.search(rendered)
    assert "\x1b[7m" in rendered
    for words in ("▸", "running", "retrying", "paused"):
        assert words in rendered


def test_with_colours_trouble_is_coloured(renderer: Renderer) -> None:
    assert _COLOUR.search("\n".join(renderer.render(scene(), 80, 24)))


def test_a_terminal_without_unicode_gets_ascii_only() -> None:
    renderer = Renderer(colours=None, is_unicode=False)

    for view in (ViewState(), OPEN, ViewState(mode=Mode.HELP)):
        drawn = _drawn(renderer, msgspec.structs.replace(view), 80, 24)
        assert drawn.replace("…", "").isascii()


@pytest.mark.parametrize("at", [0, 57, 99])
def test_the_selected_one_of_many_pipelines_is_on_the_screen(renderer: Renderer, at: int) -> None:
    many = [msgspec.structs.replace(HEALTHY, name=f"pipeline-{n:02}") for n in range(100)]
    view = ViewState(selected=(f"pipeline-{at:02}", "worker-a"))

    drawn = _drawn_of(renderer, view, many)

    assert f"▸  pipeline-{at:02}" in drawn
    assert "pipeline* 16 of 100" in drawn


def test_what_no_relay_runs_is_not_well(renderer: Renderer) -> None:
    waiting = msgspec.structs.replace(PAUSED, enabled=True)

    for fleet in (fleet_of(HEALTHY, catalog=[waiting]), Fleet(relays=[], catalog=[waiting])):
        lines = [line.plain for line in renderer.draw(scene(fleet=fleet), 80, 24)]
        assert " pipelines unwell" in lines[1] or " pipeline unwell" in lines[1]
        assert lines[3].startswith("▸! audit-to-file")
        assert lines[4].strip() == "no relay of the group runs it"


@pytest.mark.parametrize("unknown", [{"members": 2}, {"is_coordinated": False}])
def test_what_a_relay_out_of_sight_may_run_is_not_called_unwell(
    renderer: Renderer, unknown: dict[str, object]
) -> None:
    fleet = fleet_of(HEALTHY, catalog=[msgspec.structs.replace(PAUSED, enabled=True)])
    partial = msgspec.structs.replace(
        fleet, relays=[msgspec.structs.replace(fleet.relays[0], **unknown)]
    )

    drawn = "\n".join(line.plain for line in renderer.draw(scene(fleet=partial), 80, 24))

    assert "all well" in drawn
    assert "!" not in drawn


def test_every_relay_is_looked_at_for_what_is_unwell(renderer: Renderer) -> None:
    fleet = Fleet(
        relays=[
            *fleet_of(msgspec.structs.replace(TROUBLED, name="first")).relays,
            *fleet_of(msgspec.structs.replace(TROUBLED, name="second"), worker_id="b").relays,
        ]
    )

    lines = renderer.draw(scene(fleet=fleet), 120, 24)

    assert "2 of 2 pipelines unwell" in lines[1].plain
    assert [lines[row].plain.split()[1] for row in (3, 5)] == ["first", "second"]


def test_the_help_is_not_cut_at_80_columns(renderer: Renderer) -> None:
    body = _drawn(renderer, ViewState(mode=Mode.HELP), 80, 24).splitlines()[2:]

    assert not [line for line in body if "…" in line]


@pytest.mark.parametrize("is_open", [False, True])
def test_a_reason_is_shown_with_its_remedy(renderer: Renderer, is_open: bool) -> None:
    reason = f"there is no stream {'x' * 60}; make it, or set create_stream"
    unwell = msgspec.structs.replace(HEALTHY, is_healthy=False, trouble=reason)

    drawn = _drawn_of(renderer, ViewState(is_open=is_open), [unwell])

    assert "create_stream" in drawn


@pytest.mark.parametrize("sort", list(Sort))
def test_the_unwell_come_first_in_every_order_and_say_why(renderer: Renderer, sort: Sort) -> None:
    refusing = msgspec.structs.replace(
        HEALTHY, name="zeal-to-nats", is_healthy=False, trouble="it refuses everything"
    )
    retrying = msgspec.structs.replace(HEALTHY, name="able-to-nats", errors=9, rate_per_s=999.0)

    lines = _drawn_of(renderer, ViewState(sort=sort), [retrying, refusing]).splitlines()

    assert lines[3].startswith("▸! zeal-to-nats")
    assert lines[4].strip() == "it refuses everything"
    assert lines[5].startswith("   able-to-nats")


@pytest.mark.parametrize("width", [40, 80, 110, 120, 200])
@pytest.mark.parametrize("length", [8, 27])
def test_a_name_is_cut_after_everything_else(renderer: Renderer, width: int, length: int) -> None:
    name = "n" * length
    long = msgspec.structs.replace(HEALTHY, name=name, sink="a-sink-of-a-rather-long-name")

    lines = renderer.draw(scene(fleet=fleet_of(long)), width, 24)

    assert f" {name} " in lines[3].plain
    assert "running" in lines[3].plain
    assert ("42 3s" in lines[3].plain) is (width - length >= 22)


@pytest.mark.parametrize(
    "sort,first",
    [
        (Sort.NAME, "able-to-nats"),
        (Sort.STATE, "bold-to-nats"),
        (Sort.RATE, "calm-to-nats"),
        (Sort.LAG, "deep-to-nats"),
        (Sort.ERRORS, "even-to-nats"),
        (Sort.LATENCY, "firm-to-nats"),
        (Sort.DEAD_LETTERS, "grim-to-nats"),
    ],
)
def test_the_table_is_sorted_by_the_chosen_column(
    renderer: Renderer, sort: Sort, first: str
) -> None:
    differing: dict[str, dict[str, object]] = {
        "able": {},
        "bold": {"state": PipelineState.RETRYING},
        "calm": {"rate_per_s": 900.0},
        "deep": {"lag_rows": 4_000},
        "even": {"errors": 1},
        "firm": {"latency": Latency(p50_s=1, p95_s=2, p99_s=3)},
        "grim": {"dead_letters": 1},
    }
    pipelines: list[object] = [
        msgspec.structs.replace(HEALTHY, name=f"{name}-to-nats", **fields)
        for name, fields in differing.items()
    ]

    assert first in _drawn_of(renderer, ViewState(sort=sort), pipelines).splitlines()[3]


def test_a_stalled_pipeline_says_so_in_its_state(renderer: Renderer) -> None:
    stalled = msgspec.structs.replace(HEALTHY, is_stalled=True)

    assert "stalled" in _drawn_of(renderer, ViewState(), [stalled])


def test_what_several_relays_run_has_a_line_for_each_with_its_own_rate_and_counts_once(
    renderer: Renderer,
) -> None:
    slow = msgspec.structs.replace(HEALTHY, rate_per_s=3.0)
    fleet = Fleet(
        relays=[
            *fleet_of(HEALTHY, worker_id="worker-a").relays,
            *fleet_of(slow, worker_id="worker-b").relays,
        ]
    )

    lines = [line.plain for line in renderer.draw(scene(fleet=fleet), 120, 24)]

    assert "1 pipeline " in lines[1]
    assert "worker-a" in lines[3]
    assert "worker-b" in lines[4]
    assert [(one.owner, one.rate_per_s) for one in lines_of(fleet, NOW)] == [
        ("worker-a", HEALTHY.rate_per_s),
        ("worker-b", 3.0),
    ]


def test_the_owner_is_shown_where_there_are_several(renderer: Renderer) -> None:
    assert "owner" not in _drawn(renderer, ViewState(), 200, 24)


def test_a_paused_pipeline_keeps_lag_dead_letters_and_totals(renderer: Renderer) -> None:
    fleet = msgspec.structs.replace(FLEET, dead_letters={PAUSED.name: 2})

    lines = [line.plain for line in renderer.draw(scene(fleet=fleet), 120, 24)]

    (paused,) = [line for line in lines if PAUSED.name in line]
    assert paused.split()[3:] == ["-", "1k", "7m", "-", "0", "2", "4,321"]
    assert "published 16,666" in lines[1]


def test_what_fails_says_why_before_it_counts_as_unwell(renderer: Renderer) -> None:
    retrying = msgspec.structs.replace(
        HEALTHY, state=PipelineState.RETRYING, last_error="Connection refused"
    )

    lines = _drawn_of(renderer, ViewState(), [retrying]).splitlines()

    assert "1 of 1 pipeline retrying" in lines[1]
    assert lines[4].strip() == "Connection refused"


def test_backfills_and_seeks_are_shown_those_first_that_stand_still(renderer: Renderer) -> None:
    running = Backfill(
        stream_table="orders", outbox_table="outbox_orders", pipeline=None, is_filtered=False,
        state="running", sent_rows=300, estimated_rows=1000, started_at=NOW, progressed_at=NOW,
        call_pid=1,
    )  # fmt: skip
    seek = Seek(
        pipeline="p", sought_to="earliest", sought_by="ada", sought_at=NOW, after_id=0,
        through_id=9, reached_id=4,
    )  # fmt: skip
    stuck = msgspec.structs.replace(running, stream_table="bills", state="stuck")
    fleet = msgspec.structs.replace(FLEET, ongoing=[running, seek, stuck])

    first, second, third = renderer.draw(scene(ViewState(), fleet), 120, 24)[2:5]

    assert first.plain.startswith(" backfill of bills to all: stuck, 300 rows sent, about 700 left")
    assert "no progress for" in first.plain
    assert second.plain.strip() == (
        "backfill of orders to all: running, 300 rows sent, about 700 left"
    )
    assert third.plain.strip() == (
        "relay_seek of p to earliest by ada at 2026-03-01 12:00:00: behind id 0, at id 4 of 9"
    )
    many = msgspec.structs.replace(fleet, ongoing=[stuck, *[seek] * 9])
    drawn = renderer.draw(scene(ViewState(), many), 120, 24)
    assert drawn[4].plain.strip() == "8 more backfills and seeks: status --once has them"


def test_the_trouble_of_a_relay_is_told_in_full(renderer: Renderer) -> None:
    lost = msgspec.structs.replace(
        FLEET.relays[0], database_connected=False, database_reason=f"no route {'y' * 70}; MEND"
    )
    fleet = msgspec.structs.replace(FLEET, relays=[lost])

    assert "MEND" in "\n".join(one.plain for one in renderer.draw(scene(fleet=fleet), 80, 24))


def test_the_reasons_of_all_that_fits_are_shown_and_never_push_the_chosen_one_out(
    renderer: Renderer,
) -> None:
    reason = "a reason that needs more than one line at this width, because it has a REMEDY"
    unwell = [
        msgspec.structs.replace(
            HEALTHY, name=f"unwell-{n:02}", is_healthy=False, trouble=f"{reason}-{n}."
        )
        for n in range(30)
    ]
    for count, shown_in_full in ((3, 3), (7, 1), (30, 1)):
        for chosen in (0, count - 1):
            view = ViewState(selected=(f"unwell-{chosen:02}", "worker-a"))

            drawn = _drawn_of(renderer, view, unwell[:count])

            assert drawn.count("REMEDY") == shown_in_full
            assert f"▸! unwell-{chosen:02}" in drawn
            assert f"REMEDY-{chosen}." in drawn


def test_details_show_what_was_set_and_not_what_was_filled_in(renderer: Renderer) -> None:
    settings: dict[str, object] = {
        "config_version": 1,
        "source_type": "outbox",
        "sink_type": "nats",
        "source": {"outbox": "orders", "outbox_table": "outbox_orders"},
        "sink": {"type": "nats", "stream": "orders", "create_stream": True},
        "ordering": "key",
    }
    pipeline = msgspec.structs.replace(HEALTHY, settings=settings)

    drawn = _drawn_of(renderer, ViewState(is_open=True), [pipeline])

    lines = [line.partition("  ")[0].strip() for line in drawn.splitlines()]
    assert [line for line in lines if ": " in line and "connected" not in line] == [
        "source.outbox: orders",
        "sink.stream: orders",
        "sink.create_stream: true",
        "ordering: key",
    ]


@pytest.mark.parametrize("height,shown_letters", [(24, 3), (36, 6), (50, 9)])
def test_dead_letters_leave_room_for_the_facts(
    renderer: Renderer, height: int, shown_letters: int
) -> None:
    letters = [msgspec.structs.replace(DEAD_LETTERS[0], id=n, error="why " * 60) for n in range(10)]
    crowded = msgspec.structs.replace(
        scene(ViewState(is_open=True)), dead_letters={TROUBLED.name: letters}
    )

    drawn = "\n".join(line.plain for line in renderer.draw(crowded, 80, height))

    assert drawn.count(" id ") == shown_letters
    assert "99 delivered" in drawn


@pytest.mark.parametrize(
    "history,trend",
    [
        ([0] * 8, ""),
        ([100, 101, 99, 100], "██▇█"),
        ([0, 0, 50, 100], "▁▁▅█"),
        ([80, 90, 100], "▂▅█"),
    ],
)
def test_a_trend_is_scaled_to_its_own_range(
    renderer: Renderer, history: list[int], trend: str
) -> None:
    pipeline = msgspec.structs.replace(HEALTHY, rate_history=history)

    row = _drawn_of(renderer, ViewState(), [pipeline]).splitlines()[3]

    assert "".join(c for c in row if c in Signs().sparks) == trend


def test_keys_that_matter_stay_in_the_bottom_line(renderer: Renderer) -> None:
    keys = [Key(key="x", label="kill NATS", help=""), Key(key="b", label="start NATS", help="")]
    crowded = msgspec.structs.replace(scene(), keys=keys)

    bottom = renderer.draw(crowded, 80, 24)[-1].plain

    for shown_key in ("x kill NATS", "b start NATS", "enter details", "? help", "q quit"):
        assert shown_key in bottom
    assert "s sort" not in bottom


def test_an_empty_catalog_says_how_to_begin(renderer: Renderer) -> None:
    assert "set_relay_outbox" in _drawn_of(renderer, ViewState(), [])


def test_what_is_lost_or_old_is_not_called_well(renderer: Renderer) -> None:
    well = scene(fleet=fleet_of(HEALTHY))
    lost = msgspec.structs.replace(
        well.fleet.relays[0], database_connected=False, database_reason="no route", pipelines=[]
    )
    without = msgspec.structs.replace(well, fleet=Fleet(relays=[lost]))
    old = msgspec.structs.replace(well, stale="not refreshed since 12:00:00: no route")

    drawn = [
        "\n".join(line.plain for line in renderer.draw(one, 80, 24)) for one in (well, without, old)
    ]

    assert ["all well" in screen for screen in drawn] == [True, False, False]
    assert "nothing runs here at the moment" in drawn[1]
    assert "not refreshed since 12:00:00: no route" in drawn[2]


def _drawn(renderer: Renderer, view: ViewState, width: int, height: int) -> str:
    lines = renderer.draw(scene(view), width, height)
    return "".join(f"{line.plain.rstrip()}\n" for line in lines)


def _drawn_of(renderer: Renderer, view: ViewState, pipelines: list[object]) -> str:
    fleet = msgspec.structs.replace(
        FLEET,
        relays=[msgspec.structs.replace(FLEET.relays[0], pipelines=pipelines)],
        catalog=[],
    )
    return "\n".join(line.plain for line in renderer.draw(scene(view, fleet), 80, 24))
