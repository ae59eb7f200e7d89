"""The keys of a webhook ``sink`` and ``source`` object, and what must fit together in them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec

from relay.endpoint import Endpoint, endpoint_of
from relay.errors import ConfigurationError
from relay.options import (
    Connecting,
    ConnectingFlag,
    Credential,
    Format,
    Key,
    Positive,
    Routing,
    TlsKey,
)
from relay.tls import TlsKeys

SignatureScheme = Literal["hmac-sha256", "github", "stripe", "svix"]

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_FIRST_ERROR_STATUS = 400
_LAST_STATUS = 599
_PORTS = {"http": 80, "https": 443}


class WebhookSinkOptions(
    TlsKeys, msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The sink's keys. Authentication is one of ``bearer_token`` and ``username``.

    type: `webhook`.
    url: `http://` or `https://`; a user and password in it are sent as basic authentication.
    method: Of the request.
    headers: Sent with every request.
    timeout_ms: How long one request may take until its answer begins.
    batch_mode: Arrays, or a request for each message.
    max_in_flight: The most requests in flight without `batch_mode`.
    retry_on_status: Statuses that say nothing about the messages; 500 stands for unknown ones, too.
    max_body_bytes: The largest body; an array is cut at a megabyte anyway.
    bearer_token: Sent as `Authorization: Bearer`.
    username: Basic authentication, with `password`.
    password: Basic authentication, with `username`.
    hmac_secret: Signs each request by Standard Webhooks; `whsec_` and base64.
    tls: Refuse a URL that is not `https`.
    tls_ca: PEM file of the receiver's authority.
    subject_template: The subject that a message bears.
    """

    type: str
    url: Annotated[str, Key(schemes=tuple(_PORTS), connection=True)]
    method: Literal["POST", "PUT", "PATCH"] = "POST"
    headers: Annotated[Mapping[str, str], Key(connection=True)] = {}
    timeout_ms: Positive = 30_000
    batch_mode: bool = True
    max_in_flight: Positive = 16
    retry_on_status: Annotated[Sequence[int], Key(ge=_FIRST_ERROR_STATUS, le=_LAST_STATUS)] = (
        408,
        425,
        429,
        500,
        502,
        503,
        504,
    )
    max_body_bytes: Positive = 10 * 1024 * 1024
    bearer_token: Annotated[
        str | None, Key(secret=True, connection=True, excludes=("username",))
    ] = None
    username: Annotated[str | None, Key(connection=True, needs="password")] = None
    password: Annotated[str | None, Key(secret=True, connection=True, needs="username")] = None
    hmac_secret: Credential = None
    subject_template: Annotated[str, Key(template=True)] = "{stream_table}.{op}"
    routing: Routing = {}
    format: Format = "envelope"


class WebhookSourceOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The source's keys. A certificate makes it a TLS server.

    type: `webhook`.
    listen_addr: `host:port`, `[v6]:port`, or `:port` for every address.
    path: Where requests are sent to, from `/` on.
    auth_header: The header of `auth_value`; `Authorization` by default.
    auth_value: The text that the header `auth_header` must have.
    signature: How requests are signed, with `hmac_secret`.
    signature_header: Where `hmac-sha256` finds the signature.
    signature_tolerance_s: How old or early a signed request may be, in seconds; `stripe` and
        `svix`.
    hmac_secret: The secret of `signature`.
    max_body_bytes: Larger bodies are refused, as are arrays of more than 100,000 elements.
    answer_timeout_ms: A request that is not settled by then is answered 503.
    tls: Insist on TLS.
    tls_ca: PEM file of the authority whose certificates senders must show.
    tls_cert: PEM file of the server's certificate; makes it a TLS server.
    """

    type: str
    listen_addr: Annotated[str, Key(connection=True)]
    path: str = "/"
    auth_header: Annotated[str | None, Key(connection=True, needs="auth_value")] = None
    auth_value: Credential = None
    signature: Annotated[SignatureScheme | None, Key(connection=True, needs="hmac_secret")] = None
    signature_header: Annotated[str | None, Key(connection=True, needs="signature")] = None
    signature_tolerance_s: Positive = 300
    hmac_secret: Annotated[str | None, Key(secret=True, connection=True, needs="signature")] = None
    max_body_bytes: Positive = 10 * 1024 * 1024
    answer_timeout_ms: Positive = 10_000
    tls: ConnectingFlag = False
    tls_ca: Connecting = None
    tls_cert: Annotated[str | None, Key(connection=True, needs="tls_key")] = None
    tls_key: TlsKey = None


def target_of(options: WebhookSinkOptions) -> Endpoint:
    """Where the sink's URL leads. Raises `ConfigurationError`, which never contains the URL."""
    wrong = ConfigurationError("sink.url is not an HTTP address", remedy="write https://host/path")
    return endpoint_of(options.url, _PORTS, wrong)


def check_sink(options: WebhookSinkOptions, target: Endpoint) -> None:
    """Raise `ConfigurationError` for keys that contradict each other or make no sense."""
    if options.tls and not target.is_tls:
        raise ConfigurationError(
            "sink.tls is set, but sink.url is without TLS", remedy="write https://"
        )
    if target.username is not None and (options.bearer_token or options.username) is not None:
        raise ConfigurationError(
            "sink has a user in the url and another authentication", remedy="choose one"
        )
    for name, value in options.headers.items():
        if not _TOKEN.fullmatch(name) or not value.isprintable() or not value.isascii():
            raise ConfigurationError(
                f"sink.headers has {name!r}, which can't be sent",
                remedy="a name is letters, digits and dashes, a value printable ASCII",
            )


def check_source(options: WebhookSourceOptions) -> None:
    """Raise `ConfigurationError` for keys that contradict each other or make no sense."""
    if options.tls_cert is None and (options.tls or options.tls_ca is not None):
        raise ConfigurationError(
            "source asks for TLS without a certificate", remedy="set tls_cert and tls_key"
        )
    if not options.path.startswith("/") or "?" in options.path or "#" in options.path:
        raise ConfigurationError(
            f"source.path {options.path!r} is not a path", remedy="for example /hooks/orders"
        )
    if options.auth_value == "":
        raise ConfigurationError("source.auth_value is empty: anybody could send that")
    if options.signature_header is not None and options.signature != "hmac-sha256":
        raise ConfigurationError(
            "source.signature_header belongs to the signature hmac-sha256",
            remedy="the others say themselves where they stand",
        )
