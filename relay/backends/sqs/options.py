"""The keys of an SQS ``sink`` and ``source`` object, and which queue they mean."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

import msgspec

from relay.endpoint import endpoint_of
from relay.errors import ConfigurationError
from relay.options import (
    Connecting,
    Format,
    Key,
    Positive,
    Routing,
    TimeoutMs,
    TlsInsecure,
    TlsKey,
)

DEFAULT_SUBJECT = "pgtrickle.{stream_table}.{op}"
DEFAULT_GROUP = "{key}"

# The service's own limit for one message and for all of a call together.
MOST_BYTES = 1024 * 1024
_PORTS = {"http": 80, "https": 443}
_EXAMPLE = "write https://sqs.<region>.amazonaws.com/<account>/<queue>"
_LONGEST_WAIT_S = 20
_LONGEST_VISIBILITY_S = 12 * 60 * 60

_REGION_IN_HOST = re.compile(
    r"(?:^|\.)sqs(?:-fips)?\.([a-z]{2,4}(?:-[a-z]+)+-\d+)\.|^([a-z]{2}(?:-[a-z]+)+-\d+)\.queue\."
)


class SqsConnectionOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What sink and source have in common.

    type: `sqs`.
    queue_url: The queue as SQS names it, such as
        `https://sqs.eu-central-1.amazonaws.com/1234/orders`.
    region: The region that requests are signed for; by default the one in the URL, else the one of
        the AWS settings around the relay.
    endpoint_url: Where requests are sent, by default the scheme and host of `queue_url`.
    access_key_id: Who we are, with `secret_access_key`; without both the AWS chain is asked:
        environment, shared files, container, instance.
    secret_access_key: The secret key, with `access_key_id`.
    session_token: The token of temporary credentials, with the other two.
    tls_ca: PEM file of the authority that signed the server's certificate, by default the public
        ones.
    tls_cert: PEM file of our certificate.
    max_in_flight: The most calls in flight.
    """

    type: str
    queue_url: Annotated[str, Key(schemes=tuple(_PORTS), connection=True)]
    region: Connecting = None
    endpoint_url: Annotated[str | None, Key(schemes=tuple(_PORTS), connection=True)] = None
    access_key_id: Annotated[
        str | None, Key(secret=True, connection=True, needs="secret_access_key")
    ] = None
    secret_access_key: Annotated[
        str | None, Key(secret=True, connection=True, needs="access_key_id")
    ] = None
    session_token: Annotated[
        str | None, Key(secret=True, connection=True, needs="access_key_id")
    ] = None
    tls_ca: Annotated[str | None, Key(connection=True, excludes=("tls_insecure",))] = None
    tls_cert: Annotated[
        str | None, Key(connection=True, needs="tls_key", excludes=("tls_insecure",))
    ] = None
    tls_key: TlsKey = None
    tls_insecure: TlsInsecure = False
    timeout_ms: TimeoutMs = 10_000
    max_in_flight: Positive = 8


class SqsSinkOptions(SqsConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sink's keys.

    message_group_id: The message group of each event; on a FIFO queue by default `{key}`, on a
        standard queue none unless it is set (SQS then shares the queue fairly among groups).
    subject_template: The subject that an event bears in its metadata.
    max_message_bytes: The most bytes of one message, body and attributes together; by default what
        the queue allows, which is never exceeded.
    """

    message_group_id: Annotated[str | None, Key(template=True)] = None
    subject_template: Annotated[str, Key(template=True)] = DEFAULT_SUBJECT
    routing: Routing = {}
    max_message_bytes: Annotated[int | None, Key(ge=1, le=MOST_BYTES)] = None
    format: Format = "envelope"


class SqsSourceOptions(SqsConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The source's keys.

    visibility_timeout: How many seconds a message that was received stays hidden from others; it is
        extended while the message is worked on.
    wait_time_seconds: How long a receive waits for messages. A longer wait means fewer calls for an
        idle queue; closing waits at most 3 seconds for it, and what a longer one is still given is
        hidden until the visibility timeout has run out.
    """

    visibility_timeout: Annotated[int, Key(ge=1, le=_LONGEST_VISIBILITY_S)] = 30
    wait_time_seconds: Annotated[int, Key(ge=1, le=_LONGEST_WAIT_S)] = 2


class Target(msgspec.Struct, frozen=True):
    """The queue, and where requests about it go."""

    queue_url: str
    name: str
    endpoint_url: str
    host: str
    region: str | None

    @property
    def is_fifo(self) -> bool:
        """Whether the queue keeps order and deduplicates; SQS demands that its name says so."""
        return self.name.endswith(".fifo")


def target_of(options: SqsConnectionOptions, path: str) -> Target:
    """The queue that the keys name. Raises `ConfigurationError`."""
    parts = _parts(options.queue_url, f"{path}.queue_url")
    name = parts.path.rstrip("/").rpartition("/")[2]
    if not name:
        raise ConfigurationError(f"{path}.queue_url names no queue", remedy=_EXAMPLE)
    endpoint_url, host = f"{parts.scheme}://{parts.netloc}", parts.netloc
    if options.endpoint_url is not None:
        endpoint_url = options.endpoint_url
        host = _parts(endpoint_url, f"{path}.endpoint_url").netloc
    region = options.region or _region_in(options.queue_url)
    return Target(options.queue_url, name, endpoint_url, host, region)


def _parts(url: str, path: str) -> SplitResult:
    """The parts of a URL. Raises `ConfigurationError`, which never has it."""
    wrong = ConfigurationError(f"{path} is not an HTTP address", remedy=_EXAMPLE)
    if endpoint_of(url, _PORTS, wrong).username is not None:
        raise ConfigurationError(
            f"{path} has credentials in it", remedy="set access_key_id and secret_access_key"
        )
    return urlsplit(url)


def _region_in(url: str) -> str | None:
    found = _REGION_IN_HOST.search(urlsplit(url).hostname or "")
    return None if found is None else found[1] or found[2]
