"""What the commands of a publish look like, and how they are parted into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from relay import wire
from relay.backends.redis.connection import pack, pack_one
from relay.backends.redis.entry import Limits, frame_of, packed_fields
from relay.backends.redis.options import RedisSinkOptions
from relay.backends.redis.packing import Chunk, Commands, Packing
from relay.errors import MessageTooLarge, MessageUndecodable, RelayError
from relay.message import Op, RelayMessage
from relay.template import compile_routing
from tests.contract.evidence import numbered

AMPLE = Limits(10**9, 10**9)


def commands(stream: str = "s", format_: str = "envelope", **options: int) -> Commands:
    return Commands(
        RedisSinkOptions(
            type="redis", url="redis://localhost", stream_key=stream, format=format_, **options
        ),
        render=compile_routing(stream, {}),
        namespace="shop",
    )


def chunks(
    messages: Sequence[RelayMessage],
    by: Commands | None = None,
    *,
    skipped: AbstractSet[str] = frozenset(),
) -> tuple[list[Chunk], dict[int, RelayError]]:
    """All chunks, and what failed."""
    failed: dict[int, RelayError] = {}
    packing = Packing(messages, by or commands(), skipped=skipped, failed=failed)
    found: list[Chunk] = []
    while (chunk := packing.next_chunk()).indexes:
        found.append(chunk)
    return found, failed


def command_of(message: RelayMessage, format_: str = "envelope", *trimming: bytes) -> bytes:
    """What the long way makes of a message."""
    encode = wire.encoder(format_, wire.FIELD, namespace="shop")
    count, fields = packed_fields(message, encode, AMPLE)
    first = [b"XADD", message.subject.encode(), *trimming, b"*"]
    return b"*%d\r\n%b%b" % (len(first) + count, b"".join(map(pack_one, first)), fields)


@pytest.mark.parametrize("format_", ["envelope", "payload", "cloudevents"])
@given(
    dedup_keys=st.lists(st.text(), min_size=1, max_size=4),
    ops=st.lists(st.sampled_from(["insert", "event"]), min_size=4, max_size=4),
    subjects=st.lists(st.sampled_from(["one", "other"]), min_size=4, max_size=4),
    is_full_refresh=st.booleans(),
    headers=st.dictionaries(st.text(), st.text(), max_size=1),
    body=st.text(),
)
def test_a_command_is_what_it_would_be_if_it_were_packed_alone(
    format_: str,
    dedup_keys: list[str],
    ops: list[Op],
    subjects: list[str],
    is_full_refresh: bool,
    headers: dict[str, str],
    body: str,
) -> None:
    messages = [
        RelayMessage(
            dedup_key=dedup_key,
            op=op,
            subject=subject,
            is_full_refresh=is_full_refresh,
            headers=headers if place == 2 else {},
            payload=msgspec.json.encode(body),
        )
        for place, (dedup_key, op, subject) in enumerate(
            zip(dedup_keys, ops, subjects, strict=False)
        )
    ]

    ((chunk,), failed) = chunks(messages, commands(format_=format_, maxlen=7))

    trimming = (b"MAXLEN", b"~", b"7")
    expected = [command_of(message, format_, *trimming) for message in messages]
    assert b"".join(chunk.parts) == b"".join(expected)
    assert list(chunk.indexes) == list(range(len(messages)))
    assert not failed


def test_bodies_and_keys_of_every_length_are_packed() -> None:
    messages = [
        RelayMessage(dedup_key="k" * size, payload=b'"%b"' % (b"x" * size), subject="s")
        for size in (1, 9, 10, 4094, 4095, 4096, 5000, 100_000)
    ]

    ((chunk,), _) = chunks(messages)

    assert b"".join(chunk.parts) == b"".join(map(command_of, messages))


def test_more_streams_than_are_remembered_get_their_own_commands() -> None:
    messages = [
        structs.replace(message, subject=f"stream {number}")
        for number, message in enumerate(numbered(3000))
    ]
    by = commands()

    for _ in range(2):
        found, _ = chunks(messages, by)
        parts = b"".join(part for chunk in found for part in chunk.parts)
        assert parts == b"".join(map(command_of, messages))
    assert len(by.known) == 1024


def test_messages_of_more_than_one_kind_have_no_frame() -> None:
    message = RelayMessage(dedup_key="k", payload=b"1", headers={"a": "b"})

    assert frame_of(message, "envelope", "") is None
    assert frame_of(structs.replace(message, headers={}), "payload", "") is None


@pytest.mark.parametrize("field", ["dedup_key", "payload"])
def test_a_remembered_frame_does_not_get_around_a_limit(field: str) -> None:
    small = RelayMessage(dedup_key="k", payload=b"{}", subject="s")
    large = {"dedup_key": "k" * 400, "payload": b'"%s"' % (b"x" * 700)}[field]
    messages = [small, structs.replace(small, **{field: large}), small]

    ((chunk,), failed) = chunks(messages, commands(max_message_bytes=700))

    assert list(chunk.indexes) == [0, 2]
    assert isinstance(failed[1], MessageTooLarge)
    assert "700" in str(failed[1])


def test_the_servers_limit_for_a_value_holds_when_it_is_known() -> None:
    by = commands()
    message = RelayMessage(dedup_key="k", payload=b'"%s"' % (b"x" * 700), subject="s")
    assert chunks([message], by)[1] == {}

    by.limit_values(600)

    assert "proto-max-bulk-len is 600" in str(chunks([message], by)[1][0])


def test_messages_behind_a_thousand_that_cannot_be_sent_are_sent() -> None:
    broken = [structs.replace(one, payload=b"{", is_json=False) for one in numbered(2500)]
    good = numbered(10)

    found, failed = chunks([*broken, *good])

    assert [index for chunk in found for index in chunk.indexes] == list(range(2500, 2510))
    assert sorted(failed) == list(range(2500))
    assert all(isinstance(error, MessageUndecodable) for error in failed.values())


def test_what_is_in_the_stream_already_is_left_out() -> None:
    messages = numbered(5)

    found, failed = chunks(messages, skipped={messages[1].dedup_key, messages[3].dedup_key})

    assert [index for chunk in found for index in chunk.indexes] == [0, 2, 4]
    assert failed == {}


def test_a_chunk_is_bounded_in_messages_and_in_bytes() -> None:
    many, _ = chunks(numbered(2300, keys=2300))
    assert [len(chunk.indexes) for chunk in many] == [1000, 1000, 300]
    assert [chunk.end for chunk in many] == [1000, 2000, 2300]

    heavy, _ = chunks(
        [structs.replace(one, payload=b'"%b"' % (b"x" * 400_000)) for one in numbered(5)]
    )
    assert [len(chunk.indexes) for chunk in heavy] == [2, 2, 1]


def test_a_chunk_knows_its_entities_and_whether_one_comes_again() -> None:
    ((once,), _) = chunks(numbered(3, keys=3))
    assert once.keys == {"k0", "k1", "k2"}
    assert not once.repeats_key

    ((again,), _) = chunks(numbered(4, keys=3))
    assert again.repeats_key

    ((nameless,), _) = chunks([structs.replace(one, key=None) for one in numbered(3)])
    assert nameless.keys == set()
    assert not nameless.repeats_key


def test_a_stream_without_a_subject_is_rendered() -> None:
    ((chunk,), _) = chunks([RelayMessage(dedup_key="k", payload=b"1")], commands("rendered"))

    assert pack(b"XADD", b"rendered", b"*").partition(b"\r\n")[2] in b"".join(chunk.parts)
