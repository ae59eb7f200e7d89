"""The relay's own HTTP server: metrics for Prometheus, health for orchestrators and people.

=================  ==================================================================
`/metrics`         Prometheus exposition
`/health`          200 healthy, 503 degraded; for each pipeline the reason
`/livez`           200 as long as the event loop answers
`/readyz`          200 once the database is connected and it was decided what runs here
`/health/drained`  200 when everything is delivered, 202 with what is not
`/wait`            200 when a row of an outbox was delivered, 408 when not in time
`/status`          the whole board
=================  ==================================================================

All answers but the metrics are JSON, errors too. Requests are not logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from relay.board import Board, RelayStatus
from relay.catalog import Delivered
from relay.endpoint import parse_address
from relay.errors import RelayError
from relay.network import listening
from relay.settings import MetricsSettings

Render = Callable[[str], Awaitable[tuple[bytes, str]]]

_log = logging.getLogger(__name__)

_IF_TAKEN = "choose another address, port 0 for a free one, or metrics.enabled=false"
_SHUTDOWN_S = 1.0
_MEASURE_S = 5.0
_WAIT_MS = 10_000
_MOST_WAIT_MS = 600_000
_MOST_ID = 2**63 - 1
_MOST_DIGITS = 20
# The pause between two looks at a delivery doubles from the first to the most: short for those who
# have just committed, and not many looks a second for those who wait long.
_FIRST_PAUSE_S = 0.02
_MOST_PAUSE_S = 0.5


class HttpServer:
    """Serves the board and the metrics on ``settings.addr``; nothing where it is not enabled.

    ``render_metrics`` takes an Accept header and gives the exposition with its content type.
    ``measure_lag`` brings the board's lag up to date and is awaited before `/health/drained` is
    answered, so that the answer is not older than the question; it may raise `RelayError`.
    ``find_delivery`` takes a pipeline and an outbox id, gives None for an unknown pipeline, and may
    raise `RelayError`.
    """

    def __init__(
        self,
        settings: MetricsSettings,
        *,
        board: Board,
        render_metrics: Render,
        measure_lag: Callable[[], Awaitable[None]],
        find_delivery: Callable[[str, int], Awaitable[Delivered | None]],
    ) -> None:
        self._settings = settings
        self._board = board
        self._render_metrics = render_metrics
        self._measure_lag = measure_lag
        self._find_delivery = find_delivery
        self._runner: web.AppRunner | None = None
        self._address: tuple[str, int] | None = None

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port on which it listens, None while it does not."""
        return self._address

    async def start(self) -> None:
        """Listen. Raises `ConfigurationError`, `Outage` where that can't be."""
        if not self._settings.enabled:
            return
        host, port = parse_address(self._settings.addr, "metrics.addr")
        runner = web.AppRunner(
            self._application(), access_log=None, handle_signals=False, shutdown_timeout=_SHUTDOWN_S
        )
        await runner.setup()
        try:
            with listening(f"metrics.addr {self._settings.addr}", _IF_TAKEN):
                await web.TCPSite(runner, host, port).start()
        except RelayError:
            await runner.cleanup()
            raise
        self._runner = runner
        self._address = (runner.addresses[0][0], runner.addresses[0][1])

    async def aclose(self) -> None:
        """Stop listening; requests that are being answered get a second. Idempotent."""
        runner, self._runner, self._address = self._runner, None, None
        if runner is not None:
            await runner.cleanup()

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[_errors_as_json])
        application.router.add_get("/metrics", self._metrics)
        application.router.add_get("/health", self._health)
        application.router.add_get("/livez", self._livez)
        application.router.add_get("/readyz", self._readyz)
        application.router.add_get("/health/drained", self._drained)
        application.router.add_get("/wait", self._wait)
        application.router.add_get("/status", self._status)
        return application

    async def _metrics(self, request: web.Request) -> web.Response:
        body, content_type = await self._render_metrics(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _health(self, _: web.Request) -> web.Response:
        status = self._board.snapshot()
        return _json(_health_of(status), 200 if status.is_healthy else 503)

    async def _livez(self, _: web.Request) -> web.Response:
        return _json({"status": "alive"})

    async def _readyz(self, _: web.Request) -> web.Response:
        status = self._board.snapshot()
        if status.is_ready:
            return _json({"status": "ready"})
        reason = (
            "it is not decided yet which pipelines run here"
            if status.database_connected
            else status.trouble
        )
        return _json({"status": "not ready", "reason": reason}, 503)

    async def _drained(self, _: web.Request) -> web.Response:
        reason = ""
        try:
            async with asyncio.timeout(_MEASURE_S):
                await self._measure_lag()
        except TimeoutError:
            reason = "the lag could not be measured in time"
        except RelayError as error:
            reason = f"the lag could not be measured: {error}"
        status = self._board.snapshot()
        if not status.is_ready:
            reason = reason or status.trouble or "not ready"
        lagging = {
            pipeline.name: pipeline.undelivered
            for pipeline in status.pipelines
            if not pipeline.is_drained
        }
        if not lagging and not reason:
            return _json({"status": "drained"})
        return _json({"status": "draining", "reason": reason, "pipelines": lagging}, 202)

    async def _wait(self, request: web.Request) -> web.Response:
        pipeline = request.query.get("pipeline", "")
        outbox_id = _whole(request.query.get("outbox_id", ""), 1, _MOST_ID)
        timeout_ms = _whole(request.query.get("timeout_ms", str(_WAIT_MS)), 0, _MOST_WAIT_MS)
        if not pipeline or outbox_id is None or timeout_ms is None:
            usage = f"/wait?pipeline=NAME&outbox_id=ID&timeout_ms=0 to {_MOST_WAIT_MS}"
            return _json({"error": "bad request", "usage": usage}, 400)
        asked = {"pipeline": pipeline, "outbox_id": outbox_id}
        loop, pause_s, reason = asyncio.get_running_loop(), _FIRST_PAUSE_S, ""
        ends_at = loop.time() + timeout_ms / 1000
        while True:
            try:
                delivery = await self._find_delivery(pipeline, outbox_id)
            except RelayError as error:
                reason = str(error)
            else:
                reason = ""
                if delivery is None:
                    return _json({"error": "there is no such forward pipeline", **asked}, 404)
                if delivery.is_settled:
                    done = {"status": "delivered", "dead_letters": delivery.dead_letters}
                    return _json({**done, **asked})
            left_s = ends_at - loop.time()
            if left_s <= 0:
                return _json({"status": "not delivered yet", "reason": reason, **asked}, 408)
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _MOST_PAUSE_S)

    async def _status(self, _: web.Request) -> web.Response:
        return web.Response(body=self._board.snapshot().to_json(), content_type="application/json")


def _whole(text: str, least: int, most: int) -> int | None:
    """The number that a query parameter spells; None where it spells none from least to most."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < _MOST_DIGITS else -1
    return number if least <= number <= most else None


def _health_of(status: RelayStatus) -> dict[str, object]:
    return {
        "status": "healthy" if status.is_healthy else "degraded",
        "reason": status.trouble,
        "database": {"connected": status.database_connected, "reason": status.database_reason},
        "pipelines": {
            pipeline.name: {
                "direction": pipeline.direction,
                "state": pipeline.state.value,
                "healthy": pipeline.is_healthy,
                "reason": pipeline.trouble or pipeline.reason,
            }
            for pipeline in status.pipelines
        }
        | {
            name: {"state": "blocked", "healthy": False, "reason": f"its lock is held by {who}"}
            for name, who in status.blocked.items()
        }
        | {
            name: {"state": "waiting", "healthy": False, "reason": "no relay of the group runs it"}
            for name in status.unowned
        }
        | {
            name: {"state": "paused", "healthy": True, "reason": f"{rows} rows behind"}
            for name, rows in status.paused.items()
        },
    }


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json"
    )


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        answer = _json({"error": error.reason.lower(), "path": request.path}, error.status)
        if "Allow" in error.headers:
            answer.headers["Allow"] = error.headers["Allow"]
        return answer
    except Exception:  # noqa: BLE001 - a bug is answered like any other error, and logged
        _log.exception("a request could not be answered")
        return _json({"error": "internal server error", "path": request.path}, 500)
