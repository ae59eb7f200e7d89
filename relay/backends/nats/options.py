"""The keys of a NATS ``sink`` and ``source`` object, and how they say whom to connect to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

import msgspec

from relay.errors import ConfigurationError

DeliverPolicy = Literal["all", "last", "new", "last_per_subject"]

_DEFAULT_PORT = 4222
_NAME_INVALID = re.compile(r"[\s.*>/\\\x00-\x1f\x7f]")
_NAME_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_LONGEST_DURABLE = 64


class NatsConnectionOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What sink and source have in common.

    ``url``: ``nats://host:port`` or ``tls://host:port``, several separated by commas; a user and
    password in it are percent-decoded. Authentication is one of ``user`` with ``password``,
    ``token``, ``creds_file`` (path of a credentials file) and ``nkey_seed`` (the seed itself).
    ``tls`` refuses a server that offers no TLS; ``tls_ca``, ``tls_cert`` and ``tls_key`` are paths
    of PEM files and imply it; ``tls_insecure`` accepts any certificate.
    """

    type: str
    url: str
    user: str | None = None
    password: str | None = None
    token: str | None = None
    creds_file: str | None = None
    nkey_seed: str | None = None
    tls: bool = False
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_insecure: bool = False


class NatsSinkOptions(NatsConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sink's keys.

    ``subject_template``: where each event goes. ``routing``: other templates by event type or op.
    ``stream``: the only stream that may store the events; without it whichever stream listens on
    the subject does. ``create_stream``: make ``stream`` where it is missing, on file storage, for
    the constant beginning of the templates, with ``duplicate_window_s`` seconds of deduplication.
    ``max_in_flight``: messages without acknowledgement at a time. ``ack_timeout_ms``: how long to
    go on without a single acknowledgement, in milliseconds. ``format``: ``envelope``, ``payload``
    or ``cloudevents``.
    """

    subject_template: str = "pgtrickle.{stream_table}.{op}"
    routing: Mapping[str, str] = {}
    stream: str | None = None
    create_stream: bool = False
    duplicate_window_s: int = 120
    max_in_flight: int = 4096
    ack_timeout_ms: int = 5000
    format: str = "envelope"


class NatsSourceOptions(
    NatsConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The source's keys.

    ``subject``: what to consume, wildcards allowed. ``stream``: where it is stored; found by the
    subject when absent. ``durable_name``: the consumer, by default named after the pipeline.
    ``deliver_policy``: where a consumer that is made anew begins. ``ack_wait_seconds``: after how
    long without a sign of life the server delivers a message again. ``max_deliver``: how often the
    server delivers a message at most, -1 without limit; beyond it the server drops the message
    from the consumer without telling anybody.
    """

    subject: str
    stream: str | None = None
    durable_name: str | None = None
    deliver_policy: DeliverPolicy = "all"
    ack_wait_seconds: float = 30.0
    max_deliver: int = -1


class NatsServer(msgspec.Struct, frozen=True):
    """One server of a list: where it is, and who we are there."""

    host: str
    port: int
    user: str | None
    password: str | None
    is_tls: bool

    @property
    def address(self) -> str:
        """``host:port``, as errors and logs name the server."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def servers_of(urls: str, path: str) -> Sequence[NatsServer]:
    """The servers of a comma-separated list of URLs. Raises `ConfigurationError`."""
    servers = [_server(url.strip(), path) for url in urls.split(",") if url.strip()]
    if not servers:
        raise ConfigurationError(f"{path}.url is empty", remedy="write nats://host:4222")
    return servers


def check_connection(options: NatsConnectionOptions, path: str) -> None:
    """Raise `ConfigurationError` for keys that contradict each other."""
    servers_of(options.url, path)
    given = [
        name
        for name in ("user", "token", "creds_file", "nkey_seed")
        if getattr(options, name) is not None
    ]
    if len(given) > 1:
        raise ConfigurationError(
            f"{path} has both {' and '.join(given)}", remedy="choose one kind of authentication"
        )
    if (options.user is None) != (options.password is None):
        raise ConfigurationError(f"{path} needs user and password together")
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigurationError(f"{path} needs tls_cert and tls_key together")


def check_name(name: str, path: str) -> None:
    """Raise `ConfigurationError` for what can't be the name of a stream or a consumer."""
    if not name or _NAME_INVALID.search(name):
        raise ConfigurationError(
            f"{path} {name!r} is not a name that NATS accepts",
            remedy="leave out spaces, dots, wildcards and slashes",
        )


def durable_for(pipeline: str) -> str:
    """A consumer name for a pipeline: the same each time, and another for another pipeline."""
    safe = _NAME_UNSAFE.sub("_", pipeline)
    if safe == pipeline and len(safe) <= _LONGEST_DURABLE:
        return safe
    return f"{safe[:_LONGEST_DURABLE]}_{sha256(pipeline.encode()).hexdigest()[:8]}"


def _server(url: str, path: str) -> NatsServer:
    full = url if "://" in url else f"nats://{url}"
    try:
        parts: SplitResult = urlsplit(full)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if not host or parts.scheme not in ("nats", "tls"):
        raise ConfigurationError(
            f"{path}.url is not a NATS address",
            remedy="write nats://host:4222 or tls://host:4222, several separated by commas",
        )
    return NatsServer(
        host=host,
        port=port or _DEFAULT_PORT,
        user=None if parts.username is None else unquote(parts.username),
        password=None if parts.password is None else unquote(parts.password),
        is_tls=parts.scheme == "tls",
    )
