"""The keys of a Redis ``sink`` and ``source`` object, and how they say whom to connect to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

import msgspec

from relay.errors import ConfigurationError

MAX_BLOCK_MS = 1000
DEFAULT_STREAM_KEY = "pgtrickle:{stream_table}"

_DEFAULT_PORT = 6379
_DEFAULT_MESSAGE_BYTES = 64 * 1024 * 1024
_ID = re.compile(r"\$|\d{1,20}(-\d{1,20})?")


class RedisConnectionOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What sink and source have in common.

    ``url``: ``redis://host:6379/db`` or ``rediss://`` for TLS; a user and password in it are
    percent-decoded. ``username``, ``password`` and ``db`` (default 0) may stand beside it instead;
    a password alone is the default user's. ``tls`` speaks TLS whatever the scheme; ``tls_ca``,
    ``tls_cert`` and ``tls_key`` are paths of PEM files and imply it; ``tls_insecure`` accepts any
    certificate. ``timeout_ms``: how long to wait for an answer, in milliseconds, default 10000.
    """

    type: str
    url: str
    username: str | None = None
    password: str | None = None
    db: int | None = None
    tls: bool = False
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_insecure: bool = False
    timeout_ms: int = 10_000


class RedisSinkOptions(
    RedisConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The sink's keys.

    ``stream_key``: the stream that each event goes to, a template. ``routing``: other templates by
    event type or op. ``maxlen``: trim each stream to about so many entries while adding; none by
    default, since what is trimmed before it is read is lost. ``max_message_bytes``: the most bytes
    of one entry, fields and names together, default 64 MiB; a lower limit of the server for one
    value is found by itself. ``wait_replicas``: how many replicas must have received an event
    before it counts as accepted, default 0. ``format``: ``envelope``, ``payload`` or
    ``cloudevents``.
    """

    stream_key: str = DEFAULT_STREAM_KEY
    routing: Mapping[str, str] = {}
    maxlen: int | None = None
    max_message_bytes: int = _DEFAULT_MESSAGE_BYTES
    wait_replicas: int = 0
    format: str = "envelope"


class RedisSourceOptions(
    RedisConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The source's keys.

    ``stream_key``: the stream, made where it is missing. ``group_name``: the consumer group, made
    where it is missing; by default named after the pipeline. ``consumer_name``: our name in it, by
    default the pipeline's too. ``start_id``: where a new group begins: ``0`` for
    everything there is (the default), ``$`` for what comes later, or an entry id. ``block_ms``:
    how long a poll waits for entries, 1 to 1000 milliseconds, default 1000. ``count``: the most
    entries of one read, by default the pipeline's batch size. ``claim_idle_ms``: after how many
    milliseconds without a sign of life the entries of another consumer are claimed, default 60000.
    ``payload_field``: the field of somebody else's entry that holds the JSON, default ``payload``;
    an entry without it is read as one object of all its fields.
    """

    stream_key: str
    group_name: str | None = None
    consumer_name: str | None = None
    start_id: str = "0"
    block_ms: int = MAX_BLOCK_MS
    count: int | None = None
    claim_idle_ms: int = 60_000
    payload_field: str = "payload"


class Endpoint(msgspec.Struct, frozen=True):
    """Where the server is, and who we are there."""

    host: str
    port: int
    db: int
    username: str | None
    password: str | None
    is_tls: bool

    @property
    def address(self) -> str:
        """``host:port``, as errors and logs name the server."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def endpoint_of(options: RedisConnectionOptions, path: str) -> Endpoint:
    """The server that the keys name. Raises `ConfigurationError`; never repeats a password."""
    wrong = ConfigurationError(
        f"{path}.url is not a Redis address", remedy="write redis://host:6379 or rediss://host:6379"
    )
    try:
        parts = urlsplit(options.url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme not in ("redis", "rediss") or not host:
        raise wrong
    if parts.query or parts.fragment:
        raise ConfigurationError(
            f"{path}.url has a query", remedy="write its options as keys of their own"
        )
    number = parts.path.strip("/")
    if number and not number.isdecimal():
        raise ConfigurationError(
            f"{path}.url has a path that is not the number of a database",
            remedy="write redis://host:6379/0",
        )
    db = int(number) if number else None
    user, password = (unquote(one) if one else None for one in (parts.username, parts.password))
    for name, value in (("username", user), ("password", password), ("db", db)):
        if value is not None and getattr(options, name) is not None:
            raise ConfigurationError(f"{path} has {name} in its url and beside it")
    if (options.username or user) and not (options.password or password):
        raise ConfigurationError(f"{path}.username needs a password")
    return Endpoint(
        host=host,
        port=port or _DEFAULT_PORT,
        db=options.db or db or 0,
        username=options.username or user,
        password=options.password or password,
        is_tls=parts.scheme == "rediss"
        or bool(options.tls or options.tls_ca or options.tls_cert or options.tls_insecure),
    )


def check_connection(options: RedisConnectionOptions, path: str) -> None:
    """Raise `ConfigurationError` for keys that contradict each other or make no sense."""
    endpoint_of(options, path)
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigurationError(f"{path} needs tls_cert and tls_key together")
    if options.db is not None and options.db < 0:
        raise ConfigurationError(f"{path}.db must not be negative")
    check_at_least_one(path, timeout_ms=options.timeout_ms)


def check_at_least_one(path: str, **values: int | None) -> None:
    """Raise `ConfigurationError` naming the first key whose number is below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigurationError(f"{path}.{name} must be at least 1")


def check_start_id(start_id: str) -> None:
    """Raise `ConfigurationError` for what can't be a group's beginning."""
    if not _ID.fullmatch(start_id):
        raise ConfigurationError(
            f"source.start_id {start_id!r} is not an id of a stream",
            remedy="write 0 for everything, $ for what comes later, or an id as 1700000000000-0",
        )
