"""One receiver: what a request to it looks like, and what its answers mean."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from relay import __version__
from relay.backends.webhook.errors import mapped, of_status
from relay.backends.webhook.header import IDEMPOTENCY_KEY, RawHeaders
from relay.backends.webhook.options import WebhookSinkOptions
from relay.backends.webhook.signature import sign, webhook_secret
from relay.endpoint import Endpoint
from relay.errors import ConfigurationError, NotConnected, Outage, RelayError
from relay.tls import context_of

_PROBE_TIMEOUT_S = 5.0
_HEALTH_TIMEOUT_S = 2.0
_REFUSAL_S = 0.5
# A longer answer is not read to its end; its connection is closed instead.
_READ_ANSWER_BYTES = 64 * 1024
_READ_ANSWER_S = 2.0
_KEEP_IDLE_S = 30.0


class _Pool:
    """So many connections, each in a transport of its own.

    A transport with several looks at every one of them, socket included, for each request.
    """

    def __init__(self, connections: int, tls: ssl.SSLContext | None) -> None:
        self._tls = tls
        self._room = asyncio.Semaphore(connections)
        # The last one used comes first: the receiver is the least likely to have closed it.
        self._free: list[httpx.AsyncHTTPTransport] = []
        self._is_closed = False

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[httpx.AsyncHTTPTransport]:
        """One that nobody else uses meanwhile; waits for it."""
        async with self._room:
            transport = self._free.pop() if self._free else self._new()
            is_sound = False
            try:
                yield transport
                is_sound = True
            finally:
                # The client never frees the place of a connection that was interrupted half-way.
                if is_sound and not self._is_closed:
                    self._free.append(transport)
                else:
                    await _closed(transport)

    async def aclose(self) -> None:
        """Close all that are not in use, and the others when they are free; never raises."""
        self._is_closed = True
        free, self._free = self._free, []
        for transport in free:
            await _closed(transport)

    def _new(self) -> httpx.AsyncHTTPTransport:
        return httpx.AsyncHTTPTransport(
            verify=self._tls or False,
            trust_env=False,
            limits=httpx.Limits(
                max_connections=1, max_keepalive_connections=1, keepalive_expiry=_KEEP_IDLE_S
            ),
        )


class Client:
    """Sends requests under the options. `open` before use; safe to use from several tasks."""

    def __init__(self, options: WebhookSinkOptions, target: Endpoint) -> None:
        self._options = options
        self._target = target
        self._url = httpx.URL(options.url).copy_with(userinfo=b"", fragment=None)
        self._timeout_s = options.timeout_ms / 1000
        self._extensions = {
            "timeout": dict.fromkeys(("connect", "read", "write", "pool"), self._timeout_s)
        }
        self._fixed = _fixed_headers(options, target)
        self._signing_key = (
            None if options.hmac_secret is None else webhook_secret(options.hmac_secret, "sink")
        )
        self._pool: _Pool | None = None
        self._tls: ssl.SSLContext | None = None

    @property
    def is_open(self) -> bool:
        """True between `open` and `aclose`."""
        return self._pool is not None

    async def open(self) -> None:
        """Make sure that somebody listens there, over TLS where the URL says so; send nothing.

        Raises `Outage`, `ConfigurationError`.
        """
        await self.aclose()
        self._tls = context_of(self._options, "sink") if self._target.is_tls else None
        await self._reach(
            min(self._timeout_s, _PROBE_TIMEOUT_S), is_refusal_awaited=self._tls is not None
        )
        connections = 1 if self._options.batch_mode else self._options.max_in_flight
        self._pool = _Pool(connections, self._tls)

    async def is_reachable(self) -> bool:
        """True when somebody listens there now."""
        try:
            await self._reach(_HEALTH_TIMEOUT_S)
        except RelayError:
            return False
        return True

    async def send(self, body: bytes, headers: RawHeaders, key: str) -> RelayError | None:
        """Send one request under this idempotency key; None where it was accepted.

        Never raises a `RelayError`: what failed is given.
        """
        pool = self._pool
        if pool is None:
            return Outage("the webhook sink is not connected")
        own = [*self._fixed, *headers, (IDEMPOTENCY_KEY.encode(), key.encode())]
        if self._signing_key is not None:
            own += _signature(self._signing_key, key, body)
        try:
            with mapped(f"calling {self._target.address}"):
                request = httpx.Request(
                    self._options.method,
                    self._url,
                    headers=own,
                    content=body,
                    extensions=self._extensions,
                )
                async with pool.connection() as transport:
                    async with asyncio.timeout(self._timeout_s):
                        response = await transport.handle_async_request(request)
                    await _read_to_its_end(response)
        except RelayError as error:
            return error
        return of_status(
            response.status_code,
            self._target.address,
            retried=self._options.retry_on_status,
            size_bytes=len(body),
            retry_after_s=seconds_of(response.headers.get("Retry-After")),
        )

    async def aclose(self) -> None:
        """Close the connections; never raises."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.aclose()

    async def _reach(self, timeout_s: float, *, is_refusal_awaited: bool = False) -> None:
        host = self._target.host
        with mapped(f"connecting to {self._target.address}"):
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(
                    host,
                    self._target.port,
                    ssl=self._tls,
                    server_hostname=None if self._tls is None else host,
                )
            try:
                if is_refusal_awaited:
                    await _hear_refusal(reader, self._target.address)
            finally:
                # An orderly end of TLS would wait for the peer.
                writer.transport.abort()


async def _closed(transport: httpx.AsyncHTTPTransport) -> None:
    with contextlib.suppress(httpx.HTTPError, OSError):
        await transport.aclose()


async def _hear_refusal(reader: asyncio.StreamReader, address: str) -> None:
    """Let TLS 1.3 object to our certificate, which it does only behind the handshake.

    A server that objects to nothing is silent. Raises `ssl.SSLError`, or `NotConnected` where the
    end of the connection was quicker than its reason.
    """
    with contextlib.suppress(TimeoutError):
        try:
            async with asyncio.timeout(_REFUSAL_S):
                is_ended = not await reader.read(1)
        except ConnectionError:
            is_ended = True
        if is_ended:
            raise NotConnected(
                f"{address} ends the connection right behind the handshake",
                remedy="if it asks for a certificate, set tls_cert and tls_key",
            )


def seconds_of(retry_after: str | None) -> float | None:
    """How long a ``Retry-After`` says to wait, given as seconds or as an HTTP date.

    None where it says nothing that can be read (https://www.rfc-editor.org/rfc/rfc9110#name-retry-after).
    """
    if retry_after is None:
        return None
    text = retry_after.strip()
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        at = parsedate_to_datetime(text)
        if at.tzinfo is None:
            at = at.replace(tzinfo=UTC)
        return max(0.0, (at - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None


def _signature(key: bytes, webhook_id: str, body: bytes) -> RawHeaders:
    timestamp = int(time.time())
    return [
        (b"webhook-id", webhook_id.encode()),
        (b"webhook-timestamp", b"%d" % timestamp),
        (b"webhook-signature", sign(key, webhook_id, timestamp, body).encode()),
    ]


def _fixed_headers(options: WebhookSinkOptions, target: Endpoint) -> RawHeaders:
    headers = {"User-Agent": f"pgtrickle-relay/{__version__}", "Accept": "*/*"}
    username, password = options.username, options.password
    if target.username is not None:
        username, password = target.username, target.password
    if options.bearer_token is not None:
        headers["Authorization"] = f"Bearer {options.bearer_token}"
    elif username is not None:
        pair = f"{username}:{password or ''}".encode()
        headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
    if not headers.get("Authorization", "").isascii():
        raise ConfigurationError("sink.bearer_token has characters that no header can carry")
    overridden = {name.lower() for name in options.headers}
    headers = {name: text for name, text in headers.items() if name.lower() not in overridden}
    return [(name.encode(), text.encode()) for name, text in {**headers, **options.headers}.items()]


async def _read_to_its_end(response: httpx.Response) -> None:
    """Leave the connection fit for the next request where that is cheap; else close it.

    The status is known by now: what happens to the rest of the answer changes nothing.
    """
    with contextlib.suppress(httpx.HTTPError, httpx.StreamError, OSError, TimeoutError):
        async with asyncio.timeout(_READ_ANSWER_S):
            size = 0
            async for chunk in response.aiter_raw():
                size += len(chunk)
                if size > _READ_ANSWER_BYTES:
                    break
    with contextlib.suppress(httpx.HTTPError, httpx.StreamError, OSError):
        await response.aclose()
