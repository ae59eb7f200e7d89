"""Acceptances in bulk: whatever arrives and however it is cut, nothing is read otherwise."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.protocol.parser import Parser

from relay.backends.nats.acceptance import Acceptances
from relay.backends.nats.frame import FrameParser

PREFIX = "_INBOX.ours."
SUBSCRIPTION = 7
HANDLED = 8
USUAL = b'{"stream":"S","seq":12}'
REPEATED = b'{"stream":"S", "domain":"hub", "seq":12,"duplicate": true}'
REFUSED = b'{"error":{"code":503,"err_code":10077,"description":"full"},"stream":"S","seq":0}'


def frame(
    body: bytes, number: int | str = 1, *, prefix: str = PREFIX, subscription: int = SUBSCRIPTION
) -> bytes:
    return f"MSG {prefix}{number} {subscription} {len(body)}\r\n".encode() + body + b"\r\n"


def headed(head: bytes, body: bytes, has_reply: bool) -> bytes:
    sizes = b"%d %d" % (len(head), len(head) + len(body))
    reply = b"$JS.ACK.1 " if has_reply else b""
    return "HMSG orders.ä ".encode() + b"%d %b%b\r\n%b%b\r\n" % (HANDLED, reply, sizes, head, body)


FRAMES = st.one_of(
    st.builds(frame, st.sampled_from([USUAL, REPEATED]), st.integers(0, 10**9)),
    st.builds(
        frame,
        st.sampled_from([USUAL, REFUSED, b"", b"{}", USUAL + b"\r\n" + frame(USUAL, 66)]),
        st.integers(0, 99),
    ),
    st.builds(frame, st.just(USUAL), st.integers(0, 99), prefix=st.just("orders.")),
    st.builds(frame, st.just(USUAL), st.integers(0, 99), subscription=st.sampled_from([5, 77])),
    st.builds(frame, st.binary(max_size=2000), st.integers(0, 99)),
    st.builds(frame, st.binary(max_size=99), st.integers(0, 9), subscription=st.just(HANDLED)),
    st.builds(headed, st.binary(max_size=9), st.binary(max_size=99), st.booleans()),
    st.sampled_from(
        [
            b"PING\r\n",
            b"PONG\r\n",
            b"+OK\r\n",
            b"-ERR 'Permissions Violation'\r\n",
            b'INFO {"server_id":"a"}\r\n',
            b"HMSG _INBOX.ours.3 7 16 16\r\nNATS/1.0 503\r\n\r\n\r\n",
            b"MSG _INBOX.ours.4 7 _INBOX.theirs 23\r\n" + USUAL + b"\r\n",
            b"MSG orders %d _INBOX.theirs 23\r\n" % HANDLED + USUAL + b"\r\n",
            b"MSG  orders\t%d 23\r\n" % HANDLED + USUAL + b"\r\n",
        ]
    ),
)


class Heard:
    """Writes down what a parser makes of what it is fed."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []

    def accepted(self, numbers: Mapping[int, int], duplicates: Mapping[int, int]) -> None:
        for counts, is_duplicate in ((numbers, False), (duplicates, True)):
            for number, count in counts.items():
                self.events += [("accepted", number, is_duplicate)] * count

    def handled(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self.events.append(("message", HANDLED, subject, reply, data, headers))

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None
    ) -> None:
        is_ours = sid == SUBSCRIPTION and subject.startswith(PREFIX.encode())
        if is_ours and not headers and data in (USUAL, REPEATED):
            number = int(subject.removeprefix(PREFIX.encode()))
            self.events.append(("accepted", number, data == REPEATED))
        else:
            self.events.append(("message", sid, subject, reply, data, headers))

    async def _process_err(self, text: str) -> None:
        self.events.append(("error", text))

    async def _process_ping(self) -> None:
        self.events.append(("ping",))

    async def _process_pong(self) -> None:
        self.events.append(("pong",))

    async def _process_info(self, info: dict[str, str]) -> None:
        self.events.append(("info", info["server_id"]))

    def in_order(self) -> list[list[tuple[object, ...]]]:
        """The events; acceptances with nothing between them have no order."""
        groups = itertools.groupby(self.events, key=lambda event: event[0] == "accepted")
        return [
            sorted(group, key=repr) if is_accepted else list(group) for is_accepted, group in groups
        ]


async def fed(parser: Parser, data: bytes, cuts: Sequence[int]) -> None:
    for start, end in itertools.pairwise([0, *sorted(cuts), len(data)]):
        await parser.parse(data[start:end])


@given(st.lists(FRAMES, max_size=30), st.data())
def test_what_arrives_means_the_same_as_to_the_librarys_own_parser(
    frames: list[bytes], draw: st.DataObject
) -> None:
    data = b"".join(frames)
    cuts = draw.draw(st.lists(st.integers(0, len(data)), max_size=12))
    theirs, ours = Heard(), Heard()
    parser = FrameParser(ours, {HANDLED: ours.handled})
    parser.acceptances = Acceptances(PREFIX, SUBSCRIPTION, ours.accepted)

    asyncio.run(fed(Parser(theirs), data, cuts))
    asyncio.run(fed(parser, data, cuts))

    assert ours.in_order() == theirs.in_order()


@pytest.mark.parametrize("cut", range(len(headed(b"head", b"body", True))))
def test_a_message_to_a_handler_never_passes_the_librarys_parser_however_it_is_cut(
    cut: int,
) -> None:
    heard = Heard()
    parser = FrameParser(None, {HANDLED: heard.handled})

    asyncio.run(fed(parser, headed(b"head", b"body", True) * 2, [cut]))

    message = ("message", HANDLED, "orders.ä".encode(), b"$JS.ACK.1", b"body", b"head")
    assert heard.events == [message, message]


def test_a_very_large_message_is_put_together_by_the_library() -> None:
    heard = Heard()
    parser = FrameParser(heard, {HANDLED: heard.handled})
    body = bytes(3 * 1024 * 1024)
    data = headed(b"head", body, False) + headed(b"", b"next", False)

    asyncio.run(fed(parser, data, range(0, len(data), 2**20)))

    texts = [event[-2:] for event in heard.events]
    assert texts == [(body, b"head"), (b"next", None)]


def test_what_had_begun_to_arrive_is_forgotten_with_its_connection() -> None:
    heard = Heard()
    parser = FrameParser(heard, {HANDLED: heard.handled})
    asyncio.run(parser.parse(b"MSG orders 8 4\r\nto"))

    parser.reset()
    asyncio.run(parser.parse(b"PING\r\n"))

    assert heard.events == [("ping",)]


@pytest.mark.parametrize("cut", range(len(frame(USUAL)) * 2))
def test_an_acceptance_that_comes_in_two_pieces_is_read_in_bulk_all_the_same(cut: int) -> None:
    heard = Heard()
    acceptances = Acceptances(PREFIX, SUBSCRIPTION, heard.accepted)
    data = frame(USUAL, 1) + frame(USUAL, 2)

    assert acceptances.feed(data[:cut]) == b""
    assert acceptances.feed(data[cut:]) == b""

    assert heard.events == [("accepted", 1, False), ("accepted", 2, False)]


@pytest.mark.parametrize("other", [frame(REFUSED), frame(b"{}"), b"PING\r\n", b"-ERR 'x'\r\n"])
def test_the_first_thing_that_is_no_acceptance_and_all_behind_it_is_given_back(
    other: bytes,
) -> None:
    heard = Heard()
    acceptances = Acceptances(PREFIX, SUBSCRIPTION, heard.accepted)

    assert acceptances.feed(frame(REPEATED, 1) + other + frame(USUAL, 2)) == other + frame(USUAL, 2)

    assert heard.events == [("accepted", 1, True)]


def test_a_body_that_holds_another_frame_settles_nothing() -> None:
    heard = Heard()
    acceptances = Acceptances(PREFIX, SUBSCRIPTION, heard.accepted)
    forged = frame(USUAL + b"\r\n" + frame(USUAL, 2)[:-2], 1)

    assert acceptances.feed(forged) == forged

    assert heard.events == []
