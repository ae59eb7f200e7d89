"""The HTTP server, asked over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Mapping

import aiohttp
import pytest

from relay.board import Board
from relay.catalog import Delivered
from relay.endpoint import parse_address
from relay.errors import ConfigurationError, Outage
from relay.events import (
    CatalogObserved,
    DatabaseChanged,
    Event,
    LagObserved,
    OwnershipChanged,
    PipelineDescribed,
    PipelineState,
    StateChanged,
)
from relay.http import HttpServer
from relay.metrics import Metrics
from relay.settings import MetricsSettings

LOOPBACK = MetricsSettings(addr="127.0.0.1:0")


class Site:
    """A running server over its own board and metrics, and a client."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.board = Board(worker_id="w1", group_id="default", stalled_after_s=60, mask=str)
        self.metrics = Metrics(self.board)
        self.session = session
        self.lag: int | Exception = 0
        # What each look at a delivery finds, the last one again and again.
        self.deliveries: list[Delivered | Exception | None] = [None]
        self.server = HttpServer(
            LOOPBACK,
            board=self.board,
            render_metrics=self.metrics.render,
            measure_lag=self.measure_lag,
            find_delivery=self.find_delivery,
        )

    async def find_delivery(self, pipeline: str, outbox_id: int) -> Delivered | None:
        assert (pipeline, outbox_id) == ("p", 7)
        found = self.deliveries.pop(0) if len(self.deliveries) > 1 else self.deliveries[0]
        if isinstance(found, Exception):
            raise found
        return found

    async def measure_lag(self) -> None:
        if isinstance(self.lag, Exception):
            raise self.lag
        self.emit(
            LagObserved(
                pipeline="p",
                direction="forward",
                lag_rows=self.lag,
                oldest_unsent_age_s=0.0,
                dead_letters=0,
            )
        )

    def emit(self, event: Event) -> None:
        self.board(event)

    def run_a_pipeline(self) -> None:
        self.emit(DatabaseChanged(is_connected=True))
        self.emit(
            PipelineDescribed(
                pipeline="p", direction="forward", source="outbox", sink="nats", settings={}
            )
        )
        self.emit(OwnershipChanged(pipelines=["p"], members=1))
        self.state(PipelineState.RUNNING)

    def state(self, state: PipelineState, reason: str = "") -> None:
        self.emit(StateChanged(pipeline="p", direction="forward", state=state, reason=reason))

    def url(self, path: str) -> str:
        assert self.server.address is not None
        host, port = self.server.address
        return f"http://{host}:{port}{path}"

    async def get(self, path: str) -> tuple[int, Mapping[str, object]]:
        async with self.session.get(self.url(path)) as answer:
            assert answer.content_type == "application/json"
            return answer.status, json.loads(await answer.read())


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with aiohttp.ClientSession() as session:
        site = Site(session)
        await site.server.start()
        async with contextlib.aclosing(site.server):
            yield site


async def test_livez_answers_before_anything_else_is_there(site: Site) -> None:
    assert await site.get("/livez") == (200, {"status": "alive"})


async def test_readyz_waits_for_the_database_and_then_for_ownership(site: Site) -> None:
    status, body = await site.get("/readyz")
    assert (status, body["reason"]) == (503, "the database is not connected")

    site.emit(DatabaseChanged(is_connected=True))
    status, body = await site.get("/readyz")
    assert (status, body["reason"]) == (503, "it is not decided yet which pipelines run here")

    site.emit(OwnershipChanged(pipelines=[], members=1))
    assert await site.get("/readyz") == (200, {"status": "ready"})


async def test_health_is_200_while_all_is_well(site: Site) -> None:
    site.run_a_pipeline()

    assert await site.get("/health") == (
        200,
        {
            "status": "healthy",
            "reason": "",
            "database": {"connected": True, "reason": ""},
            "pipelines": {
                "p": {"direction": "forward", "state": "running", "healthy": True, "reason": ""}
            },
        },
    )


async def test_health_is_503_and_names_the_pipeline_and_its_reason(site: Site) -> None:
    site.run_a_pipeline()

    site.state(PipelineState.FAILED, "the stream ORDERS does not exist")

    status, body = await site.get("/health")
    assert status == 503
    assert body["status"] == "degraded"
    assert body["reason"] == "not healthy: p"
    assert body["pipelines"] == {
        "p": {
            "direction": "forward",
            "state": "failed",
            "healthy": False,
            "reason": "failed: the stream ORDERS does not exist",
        }
    }


async def test_health_shows_what_is_paused_and_what_no_relay_runs(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.board.board._UNOWNED_GRACE_S", 0.0)
    site.run_a_pipeline()
    idle = [
        LagObserved(
            pipeline=name,
            direction="forward",
            lag_rows=7,
            oldest_unsent_age_s=1.0,
            dead_letters=0,
        )
        for name in ("off", "free")
    ]

    site.emit(CatalogObserved(outboxes=[], unowned=["free"], idle=idle))

    status, body = await site.get("/health")
    pipelines = body["pipelines"]
    assert isinstance(pipelines, dict)
    assert (status, body["reason"]) == (503, "no relay of the group runs: free")
    assert pipelines["off"] == {"state": "paused", "healthy": True, "reason": "7 rows behind"}
    assert pipelines["free"]["state"] == "waiting"
    assert not pipelines["free"]["healthy"]


async def test_health_is_503_while_the_database_is_lost(site: Site) -> None:
    site.run_a_pipeline()

    site.emit(DatabaseChanged(is_connected=False, reason="connection refused"))

    status, body = await site.get("/health")
    assert status == 503
    assert body["database"] == {"connected": False, "reason": "connection refused"}


async def test_drained_is_200_when_the_lag_that_is_measured_now_is_zero(site: Site) -> None:
    site.run_a_pipeline()

    assert await site.get("/health/drained") == (200, {"status": "drained"})


async def test_drained_is_202_with_the_lagging_pipelines(site: Site) -> None:
    site.run_a_pipeline()
    site.lag = 7

    assert await site.get("/health/drained") == (
        202,
        {"status": "draining", "reason": "", "pipelines": {"p": "7 rows behind"}},
    )


async def test_drained_is_202_when_the_lag_can_not_be_measured(site: Site) -> None:
    site.run_a_pipeline()
    site.lag = Outage("connection refused")

    status, body = await site.get("/health/drained")

    assert status == 202
    assert body["reason"] == "the lag could not be measured: connection refused"


async def test_drained_is_202_before_it_is_known_what_runs_here(site: Site) -> None:
    site.emit(DatabaseChanged(is_connected=True))

    status, body = await site.get("/health/drained")

    assert (status, body["reason"]) == (202, "not ready")


async def test_wait_is_200_as_soon_as_the_row_is_settled(site: Site) -> None:
    site.deliveries = [
        Delivered(is_settled=False, dead_letters=0),
        Outage("connection refused"),
        Delivered(is_settled=True, dead_letters=1),
    ]

    assert await site.get("/wait?pipeline=p&outbox_id=7") == (
        200,
        {"status": "delivered", "dead_letters": 1, "pipeline": "p", "outbox_id": 7},
    )


async def test_wait_is_408_when_the_time_is_over_and_says_what_keeps_it_from_looking(
    site: Site,
) -> None:
    site.deliveries = [Delivered(is_settled=False, dead_letters=0)]
    assert await site.get("/wait?pipeline=p&outbox_id=7&timeout_ms=1") == (
        408,
        {"status": "not delivered yet", "reason": "", "pipeline": "p", "outbox_id": 7},
    )

    site.deliveries = [Outage("connection refused")]
    status, body = await site.get("/wait?pipeline=p&outbox_id=7&timeout_ms=0")
    assert (status, body["reason"]) == (408, "connection refused")


async def test_wait_is_404_for_an_unknown_pipeline_and_400_for_what_it_can_not_read(
    site: Site,
) -> None:
    assert (await site.get("/wait?pipeline=p&outbox_id=7"))[0] == 404
    for query in (
        "",
        "pipeline=p",
        "outbox_id=7",
        "pipeline=p&outbox_id=x",
        "pipeline=p&outbox_id=0",
        "pipeline=p&outbox_id=9223372036854775808",
        "pipeline=p&outbox_id=7&timeout_ms=600001",
        "pipeline=p&outbox_id=7&timeout_ms=-1",
    ):
        status, body = await site.get(f"/wait?{query}")
        assert (status, body["error"]) == (400, "bad request"), query
        assert str(body["usage"]).startswith("/wait?pipeline=NAME&outbox_id=ID")


async def test_status_is_the_board(site: Site) -> None:
    site.run_a_pipeline()

    status, body = await site.get("/status")

    assert status == 200
    assert body["worker_id"] == "w1"
    pipelines = body["pipelines"]
    assert isinstance(pipelines, list)
    (pipeline,) = pipelines
    assert (pipeline["name"], pipeline["source"], pipeline["sink"]) == ("p", "outbox", "nats")


async def test_metrics_are_served_in_the_format_that_is_asked_for(site: Site) -> None:
    site.run_a_pipeline()

    async with site.session.get(site.url("/metrics")) as answer:
        plain = await answer.text()
        assert answer.headers["Content-Type"].startswith("text/plain")
    wish = {"Accept": "application/openmetrics-text; version=1.0.0"}
    async with site.session.get(site.url("/metrics"), headers=wish) as answer:
        openmetrics = await answer.text()
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")

    assert "pgtrickle_relay_pipelines_owned 1.0" in plain
    assert openmetrics.endswith("# EOF\n")


async def test_what_does_not_exist_is_404_in_json(site: Site) -> None:
    assert await site.get("/nothing") == (404, {"error": "not found", "path": "/nothing"})


async def test_what_is_not_allowed_is_405_in_json(site: Site) -> None:
    async with site.session.post(site.url("/health")) as answer:
        assert answer.status == 405
        assert "GET" in answer.headers["Allow"]
        assert json.loads(await answer.read())["error"] == "method not allowed"


async def test_a_bug_in_an_answer_is_500_in_json_and_the_server_goes_on(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.lag = ZeroDivisionError()

    status, body = await site.get("/health/drained")

    assert (status, body["error"]) == (500, "internal server error")
    assert "a request could not be answered" in caplog.text
    assert (await site.get("/livez"))[0] == 200


async def test_requests_leave_no_log(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    await site.get("/livez")

    assert caplog.records == []


async def test_closing_ends_within_bounds_with_a_client_still_connected(site: Site) -> None:
    await site.get("/livez")

    async with asyncio.timeout(5):
        await site.server.aclose()
        await site.server.aclose()

    assert site.server.address is None


@pytest.mark.shows("setting:metrics.enabled")
async def test_disabled_metrics_open_no_port() -> None:
    board = Board(worker_id="w", group_id="g", stalled_after_s=60, mask=str)
    metrics = Metrics(board)
    settings = MetricsSettings(enabled=False, addr="127.0.0.1:0")

    server = HttpServer(
        settings,
        board=board,
        render_metrics=metrics.render,
        measure_lag=_nothing_to_measure,
        find_delivery=_nothing_delivered,
    )
    await server.start()

    assert server.address is None


@pytest.mark.shows("setting:metrics.addr")
async def test_an_address_in_use_is_an_error_that_names_the_setting() -> None:
    board = Board(worker_id="w", group_id="g", stalled_after_s=60, mask=str)
    metrics = Metrics(board)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        addr = f"127.0.0.1:{taken.getsockname()[1]}"
        server = HttpServer(
            MetricsSettings(addr=addr),
            board=board,
            render_metrics=metrics.render,
            measure_lag=_nothing_to_measure,
            find_delivery=_nothing_delivered,
        )

        with pytest.raises(ConfigurationError) as raised:
            await server.start()

    assert str(raised.value).startswith(f"metrics.addr {addr}: the address is in use")


@pytest.mark.parametrize(
    "addr, expected",
    [
        ("0.0.0.0:9090", ("0.0.0.0", 9090)),
        (":0", (None, 0)),
        ("localhost:80", ("localhost", 80)),
        ("[::1]:9090", ("::1", 9090)),
    ],
)
def test_an_address_is_host_and_port(addr: str, expected: tuple[str | None, int]) -> None:
    assert parse_address(addr, "metrics.addr") == expected


@pytest.mark.parametrize("addr", ["", "9090", "host", "host:", "host:x", "host:70000", "::1:9090"])
def test_another_address_is_an_error_that_names_the_setting(addr: str) -> None:
    with pytest.raises(ConfigurationError, match=r"metrics\.addr"):
        parse_address(addr, "metrics.addr")


async def _nothing_delivered(_: str, __: int) -> None:
    return None


async def _nothing_to_measure() -> None:
    """For servers that are not asked whether they are drained."""
