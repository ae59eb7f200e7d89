"""Our frames are those of another implementation, however they are cut on the way."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import body, commands, header
from pamqp import frame as codec
from pamqp.base import Frame

from relay.backends.rabbitmq import frame, properties
from relay.backends.rabbitmq.content import Encoder, decoded
from relay.backends.rabbitmq.frame import Arrivals, Broken, Content, FrameReader
from relay.contracts import Rejected
from relay.errors import MessageRejected
from relay.message import RelayMessage
from tests.contract.evidence import assert_same_message, complete_message

FRAME_MAX = 4096


class Heard:
    """What a reader reports, in order."""

    def __init__(self) -> None:
        self.events: list[object] = []
        self.reader = FrameReader(
            Arrivals(
                method=lambda channel, method: self.events.append((channel, method.name)),
                delivered=self.events.append,
                returned=self.events.append,
                accepted=self._accepted,
                confirmed=lambda *confirmed: self.events.append(confirmed),
            )
        )

    def _accepted(self, tags: Sequence[int]) -> None:
        self.events.extend(tags)


def unmarshalled(data: bytes) -> list[Frame | body.ContentBody | header.ContentHeader]:
    frames = []
    while data:
        size, channel, one = codec.unmarshal(data)
        assert channel == frame.CHANNEL
        assert isinstance(one, Frame | body.ContentBody | header.ContentHeader)
        frames.append(one)
        data = data[size:]
    return frames


def test_another_codec_reads_what_is_published() -> None:
    raw = (
        properties.before("application/json")
        + properties.table(properties.field("nä".encode(), "wört".encode()))
        + properties.after(b"id")
    )
    content = b"x" * 10_000
    published = b"".join(
        (
            frame.publish("exchänge", "a.b", is_mandatory=True),
            frame.header(raw, len(content)),
            frame.bodies(content, FRAME_MAX),
        )
    )

    publish, head, *parts = unmarshalled(published)

    assert isinstance(publish, commands.Basic.Publish)
    assert (publish.exchange, publish.routing_key) == ("exchänge", "a.b")
    assert publish.mandatory
    assert isinstance(head, header.ContentHeader)
    assert head.body_size == len(content)
    assert head.properties.message_id == "id"
    assert head.properties.delivery_mode == 2
    assert head.properties.headers == {"nä": "wört"}
    assert b"".join(one.value for one in parts if isinstance(one, body.ContentBody)) == content


def test_another_codec_reads_our_acknowledgements() -> None:
    ack, nack = unmarshalled(
        frame.acknowledgement(7, is_multiple=True) + frame.giving_back(9, is_multiple=False)
    )

    assert isinstance(ack, commands.Basic.Ack)
    assert (ack.delivery_tag, ack.multiple) == (7, True)
    assert isinstance(nack, commands.Basic.Nack)
    assert (nack.delivery_tag, nack.multiple, nack.requeue) == (9, False, True)


def delivery(tag: int, content: bytes, **keys: object) -> bytes:
    """A delivered message as another codec writes it."""
    head = header.ContentHeader(
        body_size=len(content),
        properties=commands.Basic.Properties(**keys),  # type: ignore[arg-type]  # passed on as they came
    )
    parts = [content[start : start + 100] for start in range(0, len(content), 100)]
    return b"".join(
        codec.marshal(one, frame.CHANNEL)
        for one in (
            commands.Basic.Deliver("tag", tag, False, "exchange", "routing.key"),
            head,
            *map(body.ContentBody, parts),
        )
    )


@given(st.lists(st.integers(min_value=1, max_value=400), max_size=30), st.binary(max_size=350))
def test_whatever_the_cuts_all_arrives_in_order(cuts: list[int], content: bytes) -> None:
    stream = b"".join(
        (
            codec.marshal(commands.Basic.Ack(1, False), frame.CHANNEL),
            codec.marshal(commands.Basic.Ack(2, False), frame.CHANNEL),
            codec.marshal(commands.Basic.Ack(5, True), frame.CHANNEL),
            frame.HEARTBEAT_FRAME,
            delivery(1, content, message_id="a"),
            codec.marshal(commands.Basic.Nack(6, False, False), frame.CHANNEL),
            codec.marshal(commands.Connection.Blocked("low on memory"), 0),
            delivery(2, b""),
        )
    )
    heard = Heard()

    for cut in cuts:
        heard.reader.feed(stream[:cut])
        stream = stream[cut:]
    heard.reader.feed(stream)

    assert heard.events[:3] == [1, 2, (5, True, False)]
    first, refused, method, second = heard.events[3:]
    assert isinstance(first, Content)
    assert (first.tag, first.body, first.routing_key) == (1, content, "routing.key")
    assert refused == (6, False, True)
    assert method == (0, "Connection.Blocked")
    assert isinstance(second, Content)
    assert second.body == b""


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"\x08\x00\x00\x00\x00\x00\x00\x00",
        b"\x03\x00\x01\x00\x00\x00\x01x\xce",
        b"\x02\x00\x01\x00\x00\x00\x01x\xce",
    ],
)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(Broken):
        Heard().reader.feed(data)


def test_properties_of_another_codec_are_read_with_every_type_of_value() -> None:
    at = datetime(2025, 3, 30, 2, 30, 15, tzinfo=UTC)
    heard = Heard()
    heard.reader.feed(
        delivery(
            1,
            b"{}",
            content_type="text/json",
            content_encoding="gzip",
            headers={"n": 1, "t": True, "d": at, "list": [1, {"x": None}], "none": None, "s": "ä"},
            delivery_mode=1,
            priority=3,
            correlation_id="c",
            reply_to="r",
            expiration="100",
            message_id="m",
            timestamp=at,
            message_type="kind",
            user_id="u",
            app_id="a",
        )
    )
    (content,) = heard.events
    assert isinstance(content, Content)

    found = properties.decoded(content.properties)

    assert (found.content_type, found.message_id, found.created_at) == ("text/json", "m", at)
    assert found.headers["list"] == '[1,{"x":null}]'
    assert found.headers["t"] == "true"
    assert found.headers["type"] == "kind"
    assert found.headers["correlation-id"] == "c"
    assert found.headers["s"] == "ä"


@given(st.binary(max_size=60))
def test_broken_properties_are_an_error_of_that_message_alone(raw: bytes) -> None:
    one = decoded(Content(1, "", "key", properties=raw, body=b"{}"), "queue")

    assert isinstance(one, RelayMessage | Rejected)


@pytest.mark.parametrize("format_", ["envelope", "payload", "cloudevents"])
def test_a_message_comes_back_as_it_was(format_: str) -> None:
    encoder = Encoder(format_, namespace="")  # type: ignore[arg-type]  # one of the three
    for sent in (complete_message(), RelayMessage(dedup_key="ä" * 200, payload=b"{}", subject="x")):
        content = encoder.body(sent)
        head = encoder.header(sent, len(content), 131072)
        _, _, raw = codec.unmarshal(head)
        assert isinstance(raw, header.ContentHeader)
        # Behind class, weight and size of the frame's payload.
        one = decoded(Content(1, "e", "x", properties=head[19:-1], body=content), "queue")
        assert isinstance(one, RelayMessage)
        expected = {"dedup_key", "payload", "key", "op", "headers", "outbox_id", "created_at"}
        assert_same_message(one, sent, frozenset(expected))
        assert len(raw.properties.message_id or "") <= 255


def test_text_that_is_not_unicode_is_refused() -> None:
    encoder = Encoder("payload", namespace="")
    for broken in (
        RelayMessage(dedup_key="a\ud800", payload=b"{}"),
        RelayMessage(dedup_key="a", payload=b"{}", headers={"x": "\ud800"}),
        RelayMessage(dedup_key="a", payload=b"{}", headers={"\ud800": "x"}),
    ):
        with pytest.raises(MessageRejected):
            encoder.header(broken, 2, 131072)
