"""The keys of a webhook ``sink`` and ``source`` object, and what must fit together in them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal
from urllib.parse import unquote, urlsplit

import msgspec

from relay.errors import ConfigurationError

SignatureScheme = Literal["hmac-sha256", "github", "stripe", "svix"]

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_FIRST_ERROR_STATUS = 400
_LAST_STATUS = 599


class WebhookSinkOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sink's keys.

    ``url``: ``http://`` or ``https://``; a user and password in it are sent as basic
    authentication. ``method``: of the request. ``headers``: sent with every request.
    ``timeout_ms``: for one request until its answer begins. ``batch_mode``: arrays, or a request
    for each message. ``max_in_flight``: requests at a time without ``batch_mode``.
    ``retry_on_status``: statuses of 400 and above that say nothing about the messages.
    ``max_body_bytes``: the largest body; an array is cut at a megabyte anyway.

    Authentication is one of ``bearer_token`` and ``username`` with ``password``. ``hmac_secret``:
    ``whsec_`` and base64, signs requests by Standard Webhooks. ``tls`` refuses a URL without TLS;
    ``tls_ca``, ``tls_cert`` and ``tls_key`` are paths of PEM files; ``tls_insecure`` accepts any
    certificate. ``subject_template`` and ``routing``: the subject that a message bears. ``format``:
    ``envelope``, ``payload`` or ``cloudevents``.
    """

    type: str
    url: str
    method: Literal["POST", "PUT", "PATCH"] = "POST"
    headers: Mapping[str, str] = {}
    timeout_ms: int = 30_000
    batch_mode: bool = True
    max_in_flight: int = 16
    retry_on_status: Sequence[int] = (408, 425, 429, 500, 502, 503, 504)
    max_body_bytes: int = 10 * 1024 * 1024
    bearer_token: str | None = None
    username: str | None = None
    password: str | None = None
    hmac_secret: str | None = None
    tls: bool = False
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_insecure: bool = False
    subject_template: str = "{stream_table}.{op}"
    routing: Mapping[str, str] = {}
    format: str = "envelope"


class WebhookSourceOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The source's keys.

    ``listen_addr``: ``host:port``, ``[v6]:port``, or ``:port`` for every address. ``path``: where
    requests are sent to, from ``/`` on. ``auth_value``: the text that the header ``auth_header``,
    by default ``Authorization``, must have. ``signature``: how requests are signed, with
    ``hmac_secret``; ``signature_header``: where ``hmac-sha256`` finds it;
    ``signature_tolerance_s``: how old or early a signed request may be, in seconds, for ``stripe``
    and ``svix``. ``max_body_bytes``: larger bodies are refused, as are arrays of more than 100,000
    elements. ``answer_timeout_ms``: after how long a request that is not settled is answered 503.

    ``tls_cert`` and ``tls_key`` are paths of PEM files and make it a TLS server, which ``tls``
    insists on; with ``tls_ca`` senders must show a certificate of that authority.
    """

    type: str
    listen_addr: str
    path: str = "/"
    auth_header: str | None = None
    auth_value: str | None = None
    signature: SignatureScheme | None = None
    signature_header: str | None = None
    signature_tolerance_s: int = 300
    hmac_secret: str | None = None
    max_body_bytes: int = 10 * 1024 * 1024
    answer_timeout_ms: int = 10_000
    tls: bool = False
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None


class Target(msgspec.Struct, frozen=True):
    """Where a sink's URL leads, and who we are there. ``url`` has no credentials in it."""

    url: str
    host: str
    port: int
    is_tls: bool
    username: str | None
    password: str | None

    @property
    def address(self) -> str:
        """``host:port``, as errors name the receiver: the rest of a URL may be secret."""
        return address_of(self.host, self.port)


def target_of(options: WebhookSinkOptions) -> Target:
    """Take the sink's URL apart. Raises `ConfigurationError`, which never contains the URL."""
    try:
        parts = urlsplit(options.url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host or not options.url.isprintable():
        raise ConfigurationError(
            "sink.url is not an HTTP address", remedy="write https://host/path"
        )
    is_tls = parts.scheme == "https"
    return Target(
        url=parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl(),
        host=host,
        port=port or (443 if is_tls else 80),
        is_tls=is_tls,
        username=None if parts.username is None else unquote(parts.username),
        password=None if parts.password is None else unquote(parts.password),
    )


def check_sink(options: WebhookSinkOptions, target: Target) -> None:
    """Raise `ConfigurationError` for keys that contradict each other or make no sense."""
    if options.tls and not target.is_tls:
        raise ConfigurationError(
            "sink.tls is set, but sink.url is without TLS", remedy="write https://"
        )
    _check_positive("sink", options, "timeout_ms", "max_in_flight", "max_body_bytes")
    _check_pair("sink", options.tls_cert, options.tls_key)
    if (options.username is None) != (options.password is None):
        raise ConfigurationError("sink needs username and password together")
    given = [
        name
        for name, value in (
            ("bearer_token", options.bearer_token),
            ("username", options.username),
            ("a user in the url", target.username),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise ConfigurationError(
            f"sink has both {' and '.join(given)}", remedy="choose one kind of authentication"
        )
    for status in options.retry_on_status:
        if not _FIRST_ERROR_STATUS <= status <= _LAST_STATUS:
            raise ConfigurationError(
                f"sink.retry_on_status has {status}", remedy="list statuses from 400 to 599"
            )
    for name, value in options.headers.items():
        if not _TOKEN.fullmatch(name) or not value.isprintable() or not value.isascii():
            raise ConfigurationError(
                f"sink.headers has {name!r}, which can't be sent",
                remedy="a name is letters, digits and dashes, a value printable ASCII",
            )


def check_source(options: WebhookSourceOptions) -> None:
    """Raise `ConfigurationError` for keys that contradict each other or make no sense."""
    _check_positive(
        "source", options, "max_body_bytes", "answer_timeout_ms", "signature_tolerance_s"
    )
    _check_pair("source", options.tls_cert, options.tls_key)
    if options.tls_cert is None and (options.tls or options.tls_ca is not None):
        raise ConfigurationError(
            "source asks for TLS without a certificate", remedy="set tls_cert and tls_key"
        )
    if not options.path.startswith("/") or "?" in options.path or "#" in options.path:
        raise ConfigurationError(
            f"source.path {options.path!r} is not a path", remedy="for example /hooks/orders"
        )
    if options.auth_header is not None and options.auth_value is None:
        raise ConfigurationError("source.auth_header needs auth_value")
    if options.auth_value == "":
        raise ConfigurationError("source.auth_value is empty: anybody could send that")
    if (options.signature is None) != (options.hmac_secret is None):
        raise ConfigurationError("source needs signature and hmac_secret together")
    if options.signature_header is not None and options.signature != "hmac-sha256":
        raise ConfigurationError(
            "source.signature_header belongs to the signature hmac-sha256",
            remedy="the others say themselves where they stand",
        )


def listen_address(addr: str) -> tuple[str | None, int]:
    """Host, None for every address, and port. Raises `ConfigurationError`."""
    host, colon, port = addr.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and int(port) <= 65_535
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        is_port = False
    if not colon or not is_port:
        raise ConfigurationError(
            f"source.listen_addr {addr!r} is not host:port", remedy="for example 0.0.0.0:8080"
        )
    return host or None, int(port)


def address_of(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_positive(
    role: str, options: WebhookSinkOptions | WebhookSourceOptions, *names: str
) -> None:
    for name in names:
        if getattr(options, name) < 1:
            raise ConfigurationError(f"{role}.{name} must be at least 1")


def _check_pair(role: str, certificate: str | None, key: str | None) -> None:
    if (certificate is None) != (key is None):
        raise ConfigurationError(f"{role} needs tls_cert and tls_key together")
