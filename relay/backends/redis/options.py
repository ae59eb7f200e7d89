"""The keys of a Redis ``sink`` and ``source`` object, and how they say whom to connect to."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import unquote, urlsplit

import msgspec

from relay.errors import ConfigurationError
from relay.options import (
    Connecting,
    Credential,
    Format,
    Key,
    Positive,
    Routing,
    TimeoutMs,
    Tls,
    TlsCa,
    TlsCert,
    TlsInsecure,
    TlsKey,
)

MAX_BLOCK_MS = 1000
DEFAULT_STREAM_KEY = "pgtrickle:{stream_table}"

_DEFAULT_PORT = 6379
_SCHEMES = ("redis", "rediss")
_DEFAULT_MESSAGE_BYTES = 64 * 1024 * 1024
_ID = re.compile(r"\$|\d{1,20}(-\d{1,20})?")


class RedisConnectionOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What sink and source have in common.

    type: `redis`.
    url: `redis://host:6379/db`, or `rediss://` for TLS; a user and password in it are
        percent-decoded.
    username: User name of an ACL user, with `password`.
    password: Password; alone, that of the default user.
    db: Number of the database.
    """

    type: str
    url: Annotated[str, Key(schemes=_SCHEMES, connection=True)]
    username: Connecting = None
    password: Credential = None
    db: Annotated[int | None, Key(ge=0, connection=True)] = None
    tls: Tls = False
    tls_ca: TlsCa = None
    tls_cert: TlsCert = None
    tls_key: TlsKey = None
    tls_insecure: TlsInsecure = False
    timeout_ms: TimeoutMs = 10_000


class RedisSinkOptions(
    RedisConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The sink's keys.

    stream_key: The stream that each event goes to.
    maxlen: Trim each stream to about so many entries while adding; none by default, since what is
        trimmed before it is read is lost.
    max_message_bytes: The most bytes of one entry, fields and names together; a lower limit of the
        server for one value is found by itself.
    wait_replicas: How many replicas must have received an event before it counts as accepted.
    """

    stream_key: Annotated[str, Key(template=True)] = DEFAULT_STREAM_KEY
    routing: Routing = {}
    maxlen: Positive | None = None
    max_message_bytes: Positive = _DEFAULT_MESSAGE_BYTES
    wait_replicas: Annotated[int, Key(ge=0)] = 0
    format: Format = "envelope"


class RedisSourceOptions(
    RedisConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The source's keys.

    stream_key: The stream, made where it is missing.
    group_name: The consumer group, made where it is missing; by default named after the pipeline.
    consumer_name: Our name in the group, by default the pipeline's too.
    start_id: Where a new group begins: `0` for everything there is, `$` for what comes later, or an
        entry id.
    block_ms: How long a poll waits for entries, in milliseconds.
    count: The most entries of one read, by default the pipeline's batch size.
    claim_idle_ms: After how many milliseconds without a sign of life the entries of another
        consumer are claimed.
    payload_field: The field of somebody else's entry that holds the JSON; an entry without it is
        read as one object of all its fields.
    """

    stream_key: str
    group_name: str | None = None
    consumer_name: str | None = None
    start_id: str = "0"
    block_ms: Annotated[int, Key(ge=1, le=MAX_BLOCK_MS)] = MAX_BLOCK_MS
    count: Positive | None = None
    claim_idle_ms: Annotated[int, Key(ge=1000)] = 60_000
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
    if parts.scheme not in _SCHEMES or not host:
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


def check_start_id(start_id: str) -> None:
    """Raise `ConfigurationError` for what can't be a group's beginning."""
    if not _ID.fullmatch(start_id):
        raise ConfigurationError(
            f"source.start_id {start_id!r} is not an id of a stream",
            remedy="write 0 for everything, $ for what comes later, or an id as 1700000000000-0",
        )
