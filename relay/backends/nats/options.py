"""The keys of a NATS ``sink`` and ``source`` object, and how they say whom to connect to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import sha256
from typing import Annotated, Literal

import msgspec

from relay.endpoint import Endpoint, endpoint_of
from relay.errors import ConfigurationError
from relay.options import (
    Credential,
    Format,
    Key,
    Positive,
    Routing,
    Template,
)
from relay.tls import TlsKeys

DeliverPolicy = Literal["all", "last", "new", "last_per_subject"]

_PORTS = {"nats": 4222, "tls": 4222}
_NAME_INVALID = re.compile(r"[\s.*>/\\\x00-\x1f\x7f]")
_NAME_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_LONGEST_DURABLE = 64


class NatsConnectionOptions(
    TlsKeys, msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """What sink and source have in common.

    type: `nats`.
    url: `nats://host:port` or `tls://host:port`, several separated by commas; a user and password
        in it are percent-decoded.
    user: User name, with `password`.
    password: Password, with `user`.
    token: Token, instead of user and password.
    creds_file: Path of a credentials file on the relay's machine.
    nkey_seed: The NKey seed itself.
    tls: Refuse a server that offers no TLS.
    """

    type: str
    url: Annotated[str, Key(schemes=(*_PORTS, ""), connection=True)]
    user: Annotated[
        str | None,
        Key(connection=True, needs="password", excludes=("token", "creds_file", "nkey_seed")),
    ] = None
    password: Annotated[str | None, Key(secret=True, connection=True, needs="user")] = None
    token: Annotated[
        str | None, Key(secret=True, connection=True, excludes=("creds_file", "nkey_seed"))
    ] = None
    creds_file: Annotated[str | None, Key(connection=True, excludes=("nkey_seed",))] = None
    nkey_seed: Credential = None


class NatsSinkOptions(NatsConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sink's keys.

    stream: The only stream that may store the events; without it whichever stream listens on the
        subject does.
    create_stream: Make `stream` where it is missing: on file storage, for the constant beginning of
        the templates. A stream that exists is never changed.
    duplicate_window_s: Duplicate window, in seconds, of a stream that the relay makes.
    max_in_flight: The most messages without acknowledgement.
    ack_timeout_ms: How long to go on without a single acknowledgement.
    """

    subject_template: Template = "pgtrickle.{stream_table}.{op}"
    routing: Routing = {}
    stream: str | None = None
    create_stream: Annotated[bool, Key(needs="stream")] = False
    duplicate_window_s: Positive = 120
    max_in_flight: Positive = 4096
    ack_timeout_ms: Positive = 5000
    format: Format = "envelope"


class NatsSourceOptions(
    NatsConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The source's keys.

    subject: What to consume, wildcards allowed.
    stream: Where it is stored; found by the subject when absent.
    durable_name: The consumer, by default named after the pipeline.
    deliver_policy: Where a new consumer begins.
    ack_wait_seconds: After how long without a sign of life the server delivers a message again.
    max_deliver: How often the server delivers a message at most, -1 without limit; beyond it the
        server drops the message from the consumer without telling anybody.
    """

    subject: str
    stream: str | None = None
    durable_name: str | None = None
    deliver_policy: DeliverPolicy = "all"
    ack_wait_seconds: Annotated[float, Key(ge=1)] = 30.0
    max_deliver: Annotated[int, Key(ge=-1)] = -1


def servers_of(urls: str, path: str) -> Sequence[Endpoint]:
    """The servers of a comma-separated list of URLs. Raises `ConfigurationError`."""
    wrong = ConfigurationError(
        f"{path}.url is not a NATS address",
        remedy="write nats://host:4222 or tls://host:4222, several separated by commas",
    )
    found = [url.strip() for url in urls.split(",") if url.strip()]
    if not found:
        raise ConfigurationError(f"{path}.url is empty", remedy="write nats://host:4222")
    return [endpoint_of(url if "://" in url else f"nats://{url}", _PORTS, wrong) for url in found]


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
