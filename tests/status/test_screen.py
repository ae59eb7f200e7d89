from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pyte
import pytest
from rich.color import ColorSystem

from relay.events import PipelineState
from relay.status.fleet import Fleet, lines_of
from relay.status.screen import Mode, Renderer, Sort, ViewState
from tests.status.emulator import styles_of
from tests.status.scene import FLEET, HEALTHY, PAUSED, TROUBLED, fleet_of, scene

SCREENS = Path(__file__).parent / "screens"
QUESTION = ViewState(mode=Mode.CONFIRM, question="Stop this relay?")
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


@pytest.mark.parametrize(
    "name,view,width,height",
    [
        ("table-80x24", ViewState(), 80, 24),
        ("details-120x40", OPEN, 120, 40),
        ("question-80x24", QUESTION, 80, 24),
    ],
)
def test_a_screen_has_the_expected_text_and_styles(
    renderer: Renderer, name: str, view: ViewState, width: int, height: int
) -> None:
    screen = pyte.Screen(width, height)
    stream = pyte.Stream(screen)
    for row, line in enumerate(renderer.render(scene(view), width, height), 1):
        stream.feed(f"\x1b[{row};1H{line}\x1b[0m")

    text = "".join(f"{line.rstrip()}\n" for line in screen.display)
    assert text == (SCREENS / f"{name}.txt").read_text(encoding="utf-8")
    assert styles_of(screen) == (SCREENS / f"{name}.styles").read_text(encoding="utf-8")


@pytest.mark.parametrize("size", [(80, 24), (81, 25), (109, 30), (110, 30), (200, 60), (20, 5)])
@pytest.mark.parametrize(
    "view", [ViewState(), OPEN, ViewState(mode=Mode.HELP), ViewState(filter="nothing")]
)
def test_every_line_fills_the_screen_exactly(
    renderer: Renderer, view: ViewState, size: tuple[int, int]
) -> None:
    width, height = size

    lines = renderer.draw(scene(view, heading="x" * 300), width, height)

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
        assert "not healthy: audit-to-file" in lines[1]
        assert lines[3].startswith("▸! audit-to-file")
        assert any("audit-to-file: no relay of the group runs it" in line for line in lines)


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

    assert "not healthy: first, second" in renderer.draw(scene(fleet=fleet), 120, 24)[1].plain


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
    assert lines[4].startswith("   able-to-nats")
    assert lines[5].strip() == "zeal-to-nats: it refuses everything"


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
    assert [(one.owner, one.rate_per_s) for one in lines_of(fleet)] == [
        ("worker-a", HEALTHY.rate_per_s),
        ("worker-b", 3.0),
    ]


def test_an_empty_catalog_says_how_to_begin(renderer: Renderer) -> None:
    assert "set_relay_outbox" in _drawn_of(renderer, ViewState(), [])


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
