"""What both contract suites share: evidences, sample messages, bad input and bounded waiting.

An evidence is one promise of the contract that tests show. A backend that lacks the thing
promised (a file has no connection) says so in ``lacks``, with the reason; the tests of that
evidence are then skipped with exactly this reason, and the table of evidences prints it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

import msgspec
import pytest

from relay.errors import Outage, RelayError
from relay.message import RelayMessage

BOUND_S = 20.0
"""No wait of the suites is longer; a wait that reaches it fails the test."""

PAUSE_S = 0.02
"""Between two looks at something that can only be looked at."""

CLOSED_WITHIN_S = 15.0
"""No close takes longer, whatever became of the broker."""

SERIALIZED_FIELDS = frozenset(RelayMessage.__struct_fields__) - {"token"}
"""Every field of a message that leaves the process."""


class Belongings:
    """The tasks, threads and sockets of this process, as many as there were at first."""

    def __init__(self) -> None:
        self._before = self._now()

    async def until_no_more_than_before(self) -> None:
        """Wait for what ends a few turns later. Raises TimeoutError."""
        async with asyncio.timeout(BOUND_S):
            while True:
                if all(now <= then for now, then in zip(self._now(), self._before, strict=True)):
                    return
                await asyncio.sleep(PAUSE_S)

    def _now(self) -> tuple[int, int, int]:
        sockets = 0
        for descriptor in Path("/dev/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets += descriptor.readlink().name.startswith("socket")
        # The loop looks names up in threads, which it keeps.
        threads = [one for one in threading.enumerate() if not one.name.startswith("asyncio_")]
        return len(asyncio.all_tasks()), len(threads), sockets


Test = TypeVar("Test", bound=Callable[..., object])


def shows(evidence: str) -> Callable[[Test], Test]:
    """Say which evidence a test of a contract suite gives."""

    def mark(test: Test) -> Test:
        test.evidence = evidence  # type: ignore[attr-defined]  # read by Contract and by the table
        return test

    return mark


class Contract:
    """Root of both suites.

    A subclass says ``backend`` (the type as the catalog spells it), ``lacks`` (evidence to
    reason) and ``shown_as`` (evidence to how it is shown where the test server can't do better),
    and supplies a fixture named ``harness``.
    """

    direction: ClassVar[str]
    backend: ClassVar[str]
    lacks: ClassVar[Mapping[str, str]] = {}
    shown_as: ClassVar[Mapping[str, str]] = {}
    can_be_lacking: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def evidences(cls) -> dict[str, list[str]]:
        """Each evidence with the names of the tests that show it, in the order of the suite."""
        found: dict[str, list[str]] = {}
        for owner in reversed(cls.__mro__):
            for name, member in vars(owner).items():
                evidence = getattr(member, "evidence", None)
                if isinstance(evidence, str):
                    found.setdefault(evidence, []).append(name)
        return found

    @pytest.fixture(autouse=True)
    def _only_what_the_backend_has(self, request: pytest.FixtureRequest) -> None:
        evidence = str(getattr(request.function, "evidence", ""))
        if evidence in self.lacks:
            pytest.skip(f"{self.backend} lacks {evidence}: {self.lacks[evidence]}")

    def test_what_the_backend_lacks_is_declared_with_a_reason(self) -> None:
        undeclarable = self.lacks.keys() - self.can_be_lacking
        assert not undeclarable, f"no backend may lack {sorted(undeclarable)}"
        assert all(len(reason.split()) > 2 for reason in self.lacks.values())


def lacking(evidence: str) -> NotImplementedError:
    """What a harness raises where the backend lacks an evidence."""
    return NotImplementedError(f"the backend lacks {evidence}")


class DriverErrors(Protocol):
    """How a backend's error mapping is examined."""

    def mapping(self) -> AbstractContextManager[object]:
        """The context manager in which the backend calls its driver."""

    def exceptions(self) -> Iterable[BaseException]:
        """One instance of every exception class that the driver and the socket can raise."""


def assert_every_exception_is_mapped(driver: DriverErrors) -> None:
    """Fail, naming them, where the mapping lets exceptions through that are not the relay's."""

    def fail(exception: BaseException) -> None:
        raise exception

    unmapped: list[str] = []
    for exception in driver.exceptions():
        try:
            with driver.mapping():
                fail(exception)
        except RelayError:
            continue
        except BaseException as error:  # noqa: BLE001 - whatever comes out is what is tested
            unmapped.append(f"{type(exception).__name__} came out as {type(error).__name__}")
        else:
            unmapped.append(f"{type(exception).__name__} was swallowed")
    assert not unmapped


def numbered(count: int, *, keys: int = 1, start: int = 0, prefix: str = "m") -> list[RelayMessage]:
    """So many small messages; their dedup keys end in their number, their keys take turns."""
    return [
        RelayMessage(
            dedup_key=f"{prefix}:{number}",
            key=f"k{number % keys}",
            subject="orders.insert",
            op="insert",
            payload=b'{"number":%d}' % number,
            stream_table="orders",
            outbox_id=number,
        )
        for number in range(start, start + count)
    ]


def complete_message(dedup_key: str = "orders:7:0") -> RelayMessage:
    """A message in which every field is set, with text that is easily damaged on the way."""
    return RelayMessage(
        dedup_key=dedup_key,
        key='["Ä",7]',
        subject="orders.upsert",
        op="upsert",
        payload='{"id":7,"note":"a \\"b\\", c\\n☃ 🦊","deep":[{"x":null}],"n":1.50}'.encode(),
        is_full_refresh=True,
        stream_table="Order lines",
        outbox_id=9_007_199_254_740_993,
        refresh_id="7b0cb1a2-4a4f-4d1c-8e9a-0d3c5a2f9b11",
        created_at=datetime(2025, 3, 30, 2, 30, 15, 123456, tzinfo=UTC),
        headers={"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"},
    )


LOOKS_LIKE_AN_ENVELOPE = b'{"v":1,"dedup_key":"theirs","op":"insert","payload":{"a":1}}'

BAD_BODIES: Mapping[str, bytes] = {
    "invalid UTF-8": b'{"a":"\xff\xfe"}',
    "no JSON at all": b"hello",
    "an empty body": b"",
    "only white space": b"  ",
    "a cut document": b'{"a":[1,2',
    "a NUL escape": b'{"a":"\\u0000"}',
    "a raw NUL": b'{"a":"\x00"}',
    "a lone surrogate": b'{"a":"\\ud800"}',
    "10,000-deep nesting": b"[" * 10_000 + b"]" * 10_000,
    "a number beyond double": b'{"a":1e999}',
    "duplicate keys": b'{"a":1,"a":2}',
    "emoji": '{"🦊":"🦊"}'.encode(),
    "line breaks between tokens": b'{\r\n  "a": 1\n}',
    "what looks like our envelope": LOOKS_LIKE_AN_ENVELOPE,
}
"""Bodies of which each may pass or be refused as one message, and must do no other harm."""

BAD_NAMES: Mapping[str, str] = {
    "10 kB": "k" * 10_000,
    "emoji": "🦊 ☃",
    "wildcards and separators": "a.b.*.> c/d#{x}%s",
    "quotes": "a\"b'c`d",
    "line breaks": "a\r\nb\n",
    "NUL": "a\x00b",
    "a lone surrogate": "a\ud800b",
    "empty": "",
}
"""Entity keys of which each may pass or be refused as one message, and must do no other harm."""


def with_bad_content() -> list[RelayMessage]:
    """One message for each bad body and each bad key."""
    bodies = [
        RelayMessage(dedup_key=f"body:{number}", key="k", payload=body, stream_table="orders")
        for number, body in enumerate(BAD_BODIES.values())
    ]
    keys = [
        RelayMessage(dedup_key=f"key:{number}", key=key, payload=b"{}", stream_table="orders")
        for number, key in enumerate(BAD_NAMES.values())
    ]
    return bodies + keys


def dedup_keys(messages: Iterable[RelayMessage]) -> list[str]:
    """The dedup keys, in order."""
    return [message.dedup_key for message in messages]


def first_occurrences(messages: Iterable[RelayMessage]) -> list[RelayMessage]:
    """The messages as a consumer that deduplicates sees them."""
    seen: dict[str, RelayMessage] = {}
    for message in messages:
        seen.setdefault(message.dedup_key, message)
    return list(seen.values())


def assert_per_key_order(received: Sequence[RelayMessage], sent: Sequence[RelayMessage]) -> None:
    """Fail unless every sent message arrived and each key's messages in the order sent."""
    arrived = first_occurrences(received)
    assert sorted(dedup_keys(arrived)) == sorted(dedup_keys(sent))
    for key in {message.key for message in sent}:
        expected = dedup_keys(message for message in sent if message.key == key)
        assert dedup_keys(message for message in arrived if message.key == key) == expected


def assert_same_message(
    arrived: RelayMessage, sent: RelayMessage, carries: frozenset[str] = SERIALIZED_FIELDS
) -> None:
    """Fail unless the fields in ``carries`` are equal; payloads compare as JSON."""
    for field in sorted(carries - {"payload", "headers"}):
        assert getattr(arrived, field) == getattr(sent, field), field
    if "payload" in carries:
        assert msgspec.json.decode(arrived.payload) == msgspec.json.decode(sent.payload)
    if "headers" in carries:
        assert dict(arrived.headers) == dict(sent.headers)


async def until(
    read: Callable[[], Awaitable[Sequence[RelayMessage]]], at_least: int
) -> Sequence[RelayMessage]:
    """Read again and again until so many different dedup keys are there; then all of it.

    Raises TimeoutError after `BOUND_S`.
    """
    async with asyncio.timeout(BOUND_S):
        while True:
            found = await read()
            if len({message.dedup_key for message in found}) >= at_least:
                return found
            await asyncio.sleep(PAUSE_S)


async def reconnect(connect: Callable[[], Awaitable[None]]) -> None:
    """Connect as the loop does, as often as it takes. Raises TimeoutError after `BOUND_S`."""
    async with asyncio.timeout(BOUND_S):
        while True:
            try:
                await connect()
            except Outage:
                await asyncio.sleep(PAUSE_S)
            else:
                return
