"""The keys of a Redis ``sink`` and ``source`` object, and how they say whom to connect to."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
from msgspec import structs

from relay import endpoint
from relay.endpoint import Endpoint
from relay.errors import ConfigurationError
from relay.options import (
    Connecting,
    Credential,
    Format,
    Key,
    Positive,
    Routing,
    TimeoutMs,
)
from relay.tls import TlsKeys

MAX_BLOCK_MS = 1000
DEFAULT_STREAM_KEY = "pgtrickle:{stream_table}"

_PORTS = {"redis": 6379, "rediss": 6379}
_DEFAULT_MESSAGE_BYTES = 64 * 1024 * 1024
_ID = re.compile(r"\$|\d{1,20}(-\d{1,20})?")


class RedisConnectionOptions(
    TlsKeys, msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """What sink and source have in common.

    type: `redis`.
    url: `redis://host:6379/db`, or `rediss://` for TLS; a user and password in it are
        percent-decoded.
    username: User name of an ACL user, with `password`.
    password: Password; alone, that of the default user.
    db: Number of the database.
    """

    type: str
    url: Annotated[str, Key(schemes=tuple(_PORTS), connection=True)]
    username: Connecting = None
    password: Credential = None
    db: Annotated[int | None, Key(ge=0, connection=True)] = None
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


def endpoint_of(options: RedisConnectionOptions, path: str) -> tuple[Endpoint, int]:
    """The server that the keys name, and the number of the database. Raises `ConfigurationError`.

    Who we are there is in the endpoint, wherever it was said.
    """
    wrong = ConfigurationError(
        f"{path}.url is not a Redis address", remedy="write redis://host:6379 or rediss://host:6379"
    )
    found = endpoint.endpoint_of(options.url, _PORTS, wrong, options)
    endpoint.refuse_query(found, path)
    number = found.path.strip("/")
    if number and not number.isdecimal():
        raise ConfigurationError(
            f"{path}.url has a path that is not the number of a database",
            remedy="write redis://host:6379/0",
        )
    username = endpoint.either(path, "username", found.username or None, options.username)
    password = endpoint.either(path, "password", found.password or None, options.password)
    db = endpoint.either(path, "db", int(number) if number else None, options.db)
    if username and not password:
        raise ConfigurationError(f"{path}.username needs a password")
    return structs.replace(found, username=username or None, password=password or None), db or 0


def check_start_id(start_id: str) -> None:
    """Raise `ConfigurationError` for what can't be a group's beginning."""
    if not _ID.fullmatch(start_id):
        raise ConfigurationError(
            f"source.start_id {start_id!r} is not an id of a stream",
            remedy="write 0 for everything, $ for what comes later, or an id as 1700000000000-0",
        )
