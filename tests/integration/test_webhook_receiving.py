"""The webhook source as senders meet it: what it takes in, what it refuses, and how it answers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest

from relay.backends.webhook import WebhookSource, listener, source
from relay.errors import ConfigurationError
from relay.message import RelayMessage
from tests.contract.evidence import (
    PAUSE_S,
    SERIALIZED_FIELDS,
    assert_same_message,
    complete_message,
    dedup_keys,
    numbered,
)
from tests.contract.source_contract import collect, messages_of
from tests.contract.webhook_client import (
    PATH,
    Answered,
    Headers,
    call,
    read_answer,
    request_bytes,
    sink_of,
    source_of,
)
from tests.servers.finding import LOOPBACK, free_port
from tests.servers.tls import TlsFiles

BOUND_S = 10.0


@asynccontextmanager
async def listening(**keys: object) -> AsyncIterator[WebhookSource]:
    """A source with these keys that listens."""
    receiver = source_of(**keys)  # type: ignore[arg-type]  # keys of one test each
    await receiver.connect()
    try:
        yield receiver
    finally:
        await receiver.aclose()


@asynccontextmanager
async def taking(**keys: object) -> AsyncIterator[tuple[WebhookSource, list[RelayMessage]]]:
    """A source whose messages are acknowledged as they come, and the list of them."""
    taken: list[RelayMessage] = []

    async def take(receiver: WebhookSource) -> None:
        while True:
            batch = await receiver.poll()
            taken.extend(batch.messages)
            await receiver.acknowledge(batch)

    async with listening(**keys) as receiver:
        task = asyncio.create_task(take(receiver))
        yield receiver, taken
        task.cancel()
        await asyncio.wait([task])


async def in_time(answer: asyncio.Task[Answered]) -> Answered:
    async with asyncio.timeout(BOUND_S):
        return await answer


async def until_waiting(receiver: WebhookSource, count: int) -> None:
    async with asyncio.timeout(BOUND_S):
        while True:
            if receiver.waiting_messages >= count:
                return
            await asyncio.sleep(PAUSE_S)


def key(text: str) -> Headers:
    return [(b"Idempotency-Key", text.encode())]


async def test_a_request_is_answered_when_it_is_acknowledged_and_not_before() -> None:
    async with listening() as receiver:
        asking = asyncio.create_task(call(receiver.address, b'{"a":1}'))
        (batch,) = await collect(receiver, 1)
        # Further polls and waits change nothing: only the acknowledgement does.
        await receiver.poll()
        assert not asking.done()

        await receiver.acknowledge(batch)

        answer = await in_time(asking)
        assert (answer.status, answer.body) == (200, b'{"accepted":1}')


async def test_an_array_is_answered_when_its_last_element_is_acknowledged() -> None:
    async with listening(batch_size=2) as receiver:
        asking = asyncio.create_task(call(receiver.address, b"[1,2,3,4,5]"))
        batches = await collect(receiver, 5)
        assert [len(batch.messages) for batch in batches] == [2, 2, 1]
        for batch in batches[:2]:
            await receiver.acknowledge(batch)
        await receiver.poll()
        assert not asking.done()

        await receiver.acknowledge(batches[2])

        assert (await in_time(asking)).body == b'{"accepted":5}'


async def test_small_requests_gather_while_a_batch_is_unacknowledged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source, "_GATHERING_S", BOUND_S)
    async with listening() as receiver:
        asking = [asyncio.create_task(call(receiver.address, b"{}", key("first")))]
        (batch,) = await collect(receiver, 1)
        polling = asyncio.create_task(receiver.poll())
        for number in (1, 2):
            asking.append(asyncio.create_task(call(receiver.address, b"{}", key(f"{number}"))))
            await until_waiting(receiver, number)
        assert not polling.done()

        await receiver.acknowledge(batch)

        async with asyncio.timeout(BOUND_S / 2):
            gathered = await polling
        assert dedup_keys(gathered.messages) == ["1", "2"]
        await receiver.acknowledge(gathered)
        assert [(await in_time(one)).status for one in asking] == [200] * 3


async def test_what_is_worth_a_batch_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_GATHERING_S", BOUND_S)
    async with listening() as receiver:
        one = asyncio.create_task(call(receiver.address, b"{}"))
        await collect(receiver, 1)
        many = asyncio.create_task(call(receiver.address, b"[%b]" % b",".join([b"{}"] * 32)))
        await until_waiting(receiver, 32)

        async with asyncio.timeout(BOUND_S / 2):
            batch = await receiver.poll()

        assert len(batch.messages) == 32
        await receiver.aclose()
        assert [(await in_time(asking)).status for asking in (one, many)] == [503] * 2


async def test_nothing_gathers_for_long_behind_a_batch_that_is_stuck() -> None:
    async with listening() as receiver:
        asking = [asyncio.create_task(call(receiver.address, b"{}"))]
        await collect(receiver, 1)
        asking.append(asyncio.create_task(call(receiver.address, b"{}")))
        await until_waiting(receiver, 1)

        started = time.monotonic()
        batch = await receiver.poll()

        assert len(batch.messages) == 1
        assert time.monotonic() - started < 0.5
        await receiver.aclose()
        assert [(await in_time(one)).status for one in asking] == [503] * 2


async def test_a_rejected_batch_is_answered_with_a_time_to_come_again() -> None:
    async with listening() as receiver:
        asking = asyncio.create_task(call(receiver.address, b"{}"))
        (batch,) = await collect(receiver, 1)

        await receiver.reject(batch)

        answer = await in_time(asking)
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"


@pytest.mark.shows("source:webhook.answer_timeout_ms")
async def test_a_request_waits_no_longer_than_was_configured() -> None:
    async with listening(answer_timeout_ms=100) as receiver:
        started = time.monotonic()

        answer = await call(receiver.address, b"{}")

        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert 0.1 <= time.monotonic() - started < 2
        assert (await receiver.poll()).is_empty


async def test_while_nothing_can_be_written_senders_are_told_so_at_once() -> None:
    async with listening(answer_timeout_ms=100) as receiver:
        asking = asyncio.create_task(call(receiver.address, b"{}"))
        (batch,) = await collect(receiver, 1)
        await in_time(asking)
        started = time.monotonic()

        refused = await call(receiver.address, b"{}")

        assert refused.status == 503
        assert time.monotonic() - started < 0.1
        await receiver.acknowledge(batch)
        asking = asyncio.create_task(call(receiver.address, b"{}"))
        (batch,) = await collect(receiver, 1)
        await receiver.acknowledge(batch)
        assert (await in_time(asking)).status == 200


async def test_closing_answers_every_sender_who_waits() -> None:
    async with listening(batch_size=1) as receiver:
        waiting = [asyncio.create_task(call(receiver.address, b"{}")) for _ in range(5)]
        await collect(receiver, 2)
        await until_waiting(receiver, 3)

        await receiver.aclose()

        answers = [await in_time(one) for one in waiting]
        assert [answer.status for answer in answers] == [503] * 5


async def test_what_a_sender_who_went_away_has_sent_is_still_delivered() -> None:
    async with listening() as receiver:
        host, port = receiver.address.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(request_bytes(b'{"a":1}'))
        await until_waiting(receiver, 1)
        writer.transport.abort()

        (batch,) = await collect(receiver, 1)

        assert batch.messages[0].payload == b'{"a":1}'
        await receiver.acknowledge(batch)


@pytest.mark.parametrize(
    "body, headers, method, status, reason",
    [
        (b"", [], "POST", 400, "the body is empty"),
        (b"hello", [], "POST", 400, "not one JSON document"),
        (b'{"a":"\xff"}', [], "POST", 400, "not one JSON document"),
        (b'{"a":1} {"b":2}', [], "POST", 400, "not one JSON document"),
        (b"[" * 10_000 + b"]" * 10_000, [], "POST", 400, "not one JSON document"),
        (b"7", [], "POST", 400, "neither an object nor an array"),
        (b"{}", [], "GET", 405, "send a POST"),
        (b"a=b", [(b"Content-Type", b"application/x-www-form-urlencoded")], "POST", 415, "form"),
        (b"\x1f", [(b"Content-Encoding", b"gzip")], "POST", 415, "compressed"),
        (b"{}", [(b"X-Pgtrickle-Format", b"envelope")], "POST", 400, "marked as an envelope"),
        (b"{}", [(b"X-Pgtrickle-Format", b"xml")], "POST", 400, "format marker"),
        (b'[{"v":1}]', [(b"X-Pgtrickle-Format", b"envelope")], "POST", 400, "element 0: marked"),
    ],
)
async def test_bad_input_is_refused_with_a_reason_and_costs_nobody_else(
    body: bytes, headers: Headers, method: str, status: int, reason: str
) -> None:
    async with taking() as (receiver, taken):
        refused = await call(receiver.address, body, headers, method=method)
        accepted = await call(receiver.address, b'{"good":1}')

    assert refused.status == status
    assert reason in refused.error
    assert accepted.status == 200
    assert [message.payload for message in taken] == [b'{"good":1}']


async def test_another_path_is_not_found_and_an_empty_array_is_nothing_to_write() -> None:
    async with listening() as receiver:
        assert (await call(receiver.address, b"{}", path="/other")).status == 404
        assert (await call(receiver.address, b" [] ")).body == b'{"accepted":0}'


@pytest.mark.shows("source:webhook.max_body_bytes")
async def test_a_body_above_the_limit_is_refused_whether_or_not_it_says_its_size() -> None:
    async with taking(max_body_bytes=1000) as (receiver, taken):
        told = await call(receiver.address, b'"%s"' % (b"x" * 1000))
        host, port = receiver.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head.encode() + (b"400\r\n" + b"x" * 1024 + b"\r\n") * 2)
        async with asyncio.timeout(BOUND_S):
            untold = await read_answer(reader)
        writer.transport.abort()
        fitting = await call(receiver.address, b'["%s"]' % (b"x" * 996))

    assert (told.status, untold.status, fitting.status) == (413, 413, 200)
    assert "1000 bytes" in told.error
    assert len(taken) == 1


async def test_an_array_of_too_many_elements_is_refused_however_small_they_are() -> None:
    async with taking() as (receiver, taken):
        refused = await call(receiver.address, b"[%b]" % b",".join([b"1"] * 100_001))
        fitting = await call(receiver.address, b"[1,2,3]")

    assert (refused.status, fitting.status) == (413, 200)
    assert "100001 elements" in refused.error
    assert len(taken) == 3


@pytest.mark.shows("source:webhook.auth_header", "source:webhook.auth_value")
@pytest.mark.parametrize(
    "keys, name", [({"auth_value": "tökEN"}, b"Authorization"), ({}, b"X-Token")]
)
async def test_a_sender_without_the_agreed_header_is_refused(
    keys: dict[str, object], name: bytes
) -> None:
    keys = keys or {"auth_header": "x-token", "auth_value": "tökEN"}
    async with taking(**keys) as (receiver, taken):
        missing = await call(receiver.address, b"{}")
        wrong = await call(receiver.address, b"{}", [(name, b"token")])
        right = await call(receiver.address, b"{}", [(name, "tökEN".encode())])

    assert (missing.status, wrong.status, right.status) == (401, 401, 200)
    assert "is missing" in missing.error
    assert len(taken) == 1
    assert name.decode() not in taken[0].headers


async def test_a_request_with_a_wrong_signature_is_refused() -> None:
    body = b'{"a":1}'
    digest = hmac.new(b"s3cret", body, hashlib.sha256).hexdigest().encode()
    async with taking(signature="github", hmac_secret="s3cret") as (receiver, taken):
        name = b"X-Hub-Signature-256"
        wrong = await call(receiver.address, b'{"a":2}', [(name, b"sha256=" + digest)])
        right = await call(
            receiver.address, body, [(name, b"sha256=" + digest), (b"X-GitHub-Delivery", b"d-1")]
        )

    assert (wrong.status, wrong.error) == (401, "the signature does not match")
    assert right.status == 200
    assert dedup_keys(taken) == ["d-1"]


async def test_a_signed_request_of_our_own_sink_is_accepted() -> None:
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    async with taking(signature="svix", hmac_secret=secret) as (receiver, taken):
        sink = sink_of(f"http://{receiver.address}{PATH}", hmac_secret=secret)
        await sink.connect()
        result = await sink.publish(numbered(10))
        await sink.aclose()

    assert not result.failures
    assert dedup_keys(taken) == dedup_keys(numbered(10))


@pytest.mark.parametrize(
    "headers, one, several",
    [
        (key("k"), ["k"], ["k:0", "k:1"]),
        ([(b"webhook-id", b"w")], ["w"], ["w:0", "w:1"]),
        ([(b"svix-id", b"s")], ["s"], ["s:0", "s:1"]),
        ([*key("k"), (b"webhook-id", b"w")], ["k"], ["k:0", "k:1"]),
    ],
)
async def test_a_message_is_named_by_what_its_sender_calls_it(
    headers: Headers, one: Sequence[str], several: Sequence[str]
) -> None:
    async with taking() as (receiver, taken):
        await call(receiver.address, b'{"a":1}', headers)
        await call(receiver.address, b'[{"a":1},{"a":2}]', headers)

    assert dedup_keys(taken) == [*one, *several]


async def test_a_message_without_a_name_gets_one_of_its_own() -> None:
    async with taking() as (receiver, taken):
        for _ in range(2):
            await call(receiver.address, b'{"a":1}')

    assert len({uuid.UUID(found) for found in dedup_keys(taken)}) == 2
    assert taken[0].subject == PATH


@pytest.mark.parametrize("format_", ["envelope", "payload", "cloudevents"])
async def test_every_field_survives_the_way_from_our_sink(format_: str) -> None:
    headers = {
        "plain": "text",
        "Host": "not a host",
        "emoji 🦊": "🦊\r\n☃",
        "edges": "  both  ",
        "100%": "50 %",
    }
    sent = msgspec.structs.replace(complete_message(), headers=headers)
    odd = RelayMessage(dedup_key="Ä 🦊", payload=b"[1,2]", subject="Ö", key="\n")
    async with taking() as (receiver, taken):
        sink = sink_of(f"http://{receiver.address}{PATH}", batch_mode=False, format=format_)
        await sink.connect()
        result = await sink.publish([sent])
        assert not result.failures
        result = await sink.publish([odd])
        assert not result.failures
        await sink.aclose()

    assert_same_message(taken[0], sent, SERIALIZED_FIELDS)
    assert_same_message(taken[1], odd, SERIALIZED_FIELDS)


async def test_an_array_of_our_sink_keeps_the_keys_however_it_is_cut() -> None:
    sent = [complete_message(f"orders:{number}:0") for number in range(5)]
    async with taking() as (receiver, taken):
        sink = sink_of(f"http://{receiver.address}{PATH}")
        await sink.connect()
        await sink.publish(sent[:3])
        await sink.publish(sent[1:])
        await sink.aclose()

    assert dedup_keys(taken) == dedup_keys([*sent[:3], *sent[1:]])
    assert_same_message(taken[0], sent[0], SERIALIZED_FIELDS)


async def test_headers_that_say_who_the_sender_is_are_not_kept() -> None:
    headers = [(b"Cookie", b"c"), (b"Authorization", b"a"), (b"X-Kind", b"\xff"), (b"X-A", b"b")]
    async with taking() as (receiver, taken):
        await call(receiver.address, b"{}", headers)

    kept = taken[0].headers
    assert kept["X-A"] == "b"
    assert kept["X-Kind"] == "\\xff"
    assert not {"Cookie", "Authorization", "Host", "Content-Length"} & kept.keys()


@pytest.mark.shows("source:webhook.listen_addr", "source:webhook.path")
async def test_pipelines_share_an_address_and_the_last_one_frees_it() -> None:
    addr = f"{LOOPBACK}:{free_port()}"
    async with taking(addr=addr, path="/one") as (one, at_one):
        async with taking(addr=addr, path="/two") as (_, at_two):
            await call(addr, b'{"to":1}', path="/one")
            await call(addr, b'{"to":2}', path="/two")
            assert one.address == addr

        left = await call(addr, b"{}", path="/two")
        assert (left.status, left.headers["retry-after"]) == (503, "1")
        assert (await call(addr, b'{"to":1}', path="/one")).status == 200

    assert [message.payload for message in at_one] == [b'{"to":1}'] * 2
    assert [message.payload for message in at_two] == [b'{"to":2}']
    with pytest.raises(ConnectionRefusedError):
        await call(addr, b"{}", path="/one")


async def test_two_pipelines_can_not_have_one_path_nor_different_certificates(
    tls_files: TlsFiles,
) -> None:
    addr = f"{LOOPBACK}:{free_port()}"
    tls: dict[str, object] = {
        "tls_cert": str(tls_files.server_certificate),
        "tls_key": str(tls_files.server_key),
    }
    async with listening(addr=addr) as receiver:
        with pytest.raises(ConfigurationError, match="belongs to another pipeline"):
            await source_of(addr).connect()
        with pytest.raises(ConfigurationError, match="other TLS keys"):
            await source_of(addr, **{"path": "/other", **tls}).connect()  # type: ignore[arg-type]  # none is batch_size

        assert await receiver.is_healthy()


async def test_a_receiver_that_is_cut_off_while_it_closes_frees_its_path() -> None:
    addr = f"{LOOPBACK}:{free_port()}"
    other, first, second = source_of(), source_of(addr), source_of(addr)
    await other.connect()
    await first.connect()
    host, port = other.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    # Closing takes its time while somebody is still sending.
    writer.write(request_bytes(b"{}", [(b"Expect", b"100-continue")])[:-1])
    assert (await reader.readline()).startswith(b"HTTP/1.1 100")
    closing = asyncio.create_task(other.aclose())
    await asyncio.sleep(0)

    cut_off = asyncio.create_task(first.aclose())
    await asyncio.sleep(0)
    cut_off.cancel()
    await asyncio.wait([cut_off])
    await second.connect()

    asking = asyncio.create_task(call(addr, b"{}"))
    (batch,) = await collect(second, 1)
    await second.acknowledge(batch)
    assert (await in_time(asking)).status == 200
    await second.aclose()
    await closing
    writer.transport.abort()
    with pytest.raises(ConnectionError):
        await call(addr, b"{}")


async def test_an_address_that_is_taken_is_one_line_for_the_operator() -> None:
    async with await asyncio.start_server(lambda *_: None, LOOPBACK, 0) as other:
        addr = f"{LOOPBACK}:{other.sockets[0].getsockname()[1]}"

        with pytest.raises(ConfigurationError, match="the address is in use") as caught:
            await source_of(addr).connect()

    assert addr in str(caught.value)


async def test_an_address_that_is_not_ours_is_for_the_operator_too() -> None:
    with pytest.raises(ConfigurationError, match=r"203\.0\.113\.1:8080"):
        await source_of("203.0.113.1:8080").connect()


@pytest.mark.shows("source:webhook.tls_cert", "source:webhook.tls_key", "source:webhook.tls_ca")
async def test_senders_without_a_certificate_of_the_authority_are_shut_out(
    tls_files: TlsFiles,
) -> None:
    anybody = ssl.create_default_context(cafile=tls_files.authority)
    keys = {
        "tls": True,
        "tls_cert": str(tls_files.server_certificate),
        "tls_key": str(tls_files.server_key),
    }
    async with taking(**keys) as (receiver, _):
        open_to_all = await call(receiver.address, b"{}", tls=anybody)
        with pytest.raises(ConnectionResetError):
            await call(receiver.address, b"{}")
    async with taking(**keys, tls_ca=str(tls_files.authority)) as (receiver, taken):
        known = await call(receiver.address, b"{}", tls=tls_files.client_context())
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await call(receiver.address, b"{}", tls=anybody)

    assert (open_to_all.status, known.status, len(taken)) == (200, 200, 1)


async def test_certificate_files_that_are_not_there_are_named_by_their_keys() -> None:
    with pytest.raises(ConfigurationError, match="TLS files can't be used: No such file"):
        await source_of(tls_cert="/nowhere/a.pem", tls_key="/nowhere/a.key").connect()


@pytest.mark.parametrize(
    "sent, status",
    [
        (b"", None),
        (b"POST / HTTP/1.1\r\nHost: x\r\n", None),
        (request_bytes(b'{"a":1}')[:-3], 408),
    ],
)
async def test_slow_and_half_open_senders_are_disconnected(
    sent: bytes, status: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "HEADERS_TIMEOUT_S", 0.2)
    monkeypatch.setattr(listener, "BODY_TIMEOUT_S", 0.2)
    async with taking() as (receiver, taken):
        host, port = receiver.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)

        async with asyncio.timeout(BOUND_S):
            if status is None:
                assert await reader.read() == b""
            else:
                assert (await read_answer(reader)).status == status
                await reader.read()

        assert (await call(receiver.address, b"{}")).status == 200
        writer.transport.abort()
    assert len(taken) == 1


async def test_idle_connections_can_not_use_up_what_the_process_may_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener, "_MOST_CONNECTIONS", 3)
    async with taking() as (receiver, _):
        host, port = receiver.address.split(":")
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
        await asyncio.sleep(0)

        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(BOUND_S):
            assert await reader.read() == b""
        writer.transport.abort()

        for _, one in idle:
            one.transport.abort()
        async with asyncio.timeout(BOUND_S):
            while True:
                if await is_answered(receiver.address):
                    break
                await asyncio.sleep(PAUSE_S)


async def is_answered(addr: str) -> bool:
    try:
        return (await call(addr, b"{}")).status == 200
    except ConnectionError:
        return False


async def test_a_sender_who_waits_for_leave_to_send_its_body_gets_it() -> None:
    async with taking() as (receiver, _):
        host, port = receiver.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request_bytes(b"{}", [(b"Expect", b"100-continue")]))

        assert (await reader.readline()).startswith(b"HTTP/1.1 100")
        await reader.readline()
        assert (await read_answer(reader)).status == 200
        writer.transport.abort()


async def test_when_too_much_is_waiting_senders_are_told_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source, "_WAITING_MESSAGES", 3)
    monkeypatch.setattr(source, "_WAITING_BYTES", 10_000)
    async with listening(max_body_bytes=8_000) as receiver:
        first = asyncio.create_task(call(receiver.address, b"[1,2,3]"))
        await until_waiting(receiver, 3)
        by_count = await call(receiver.address, b"{}")
        batches = await collect(receiver, 3)
        big = asyncio.create_task(call(receiver.address, b'["%s"]' % (b"x" * 7_000)))
        batches += await collect(receiver, 1)
        by_bytes = await call(receiver.address, b'["%s"]' % (b"x" * 7_000))
        for batch in batches:
            await receiver.acknowledge(batch)

        assert (by_count.status, by_bytes.status) == (503, 503)
        assert [(await in_time(one)).status for one in (first, big)] == [200, 200]


async def test_what_came_in_chunks_takes_no_more_room_than_it_has_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source, "_WAITING_BYTES", 10_000)
    async with listening(max_body_bytes=8_000) as receiver:
        asking: list[asyncio.Task[Answered]] = []
        for number in range(1, 6):
            asking.append(asyncio.create_task(call_in_chunks(receiver.address, b'{"a":1}')))
            await until_waiting(receiver, number)

        for batch in await collect(receiver, 5):
            await receiver.acknowledge(batch)

        assert [(await in_time(one)).status for one in asking] == [200] * 5
        # And all of it is released.
        big = asyncio.create_task(call(receiver.address, b'["%s"]' % (b"x" * 7_000)))
        (batch,) = await collect(receiver, 1)
        await receiver.acknowledge(batch)
        assert (await in_time(big)).status == 200


async def call_in_chunks(addr: str, body: bytes) -> Answered:
    host, port = addr.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    writer.write(head.encode() + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
    try:
        return await read_answer(reader)
    finally:
        writer.transport.abort()


async def test_a_batch_holds_no_more_bytes_than_the_relay_wants_at_a_time() -> None:
    async with listening() as receiver:
        body = b"[%s]" % b",".join([b'"%s"' % (b"x" * 400_000)] * 5)
        asking = asyncio.create_task(call(receiver.address, body))

        batches = await collect(receiver, 5)

        assert [len(batch.messages) for batch in batches] == [2, 2, 1]
        for batch in batches:
            await receiver.acknowledge(batch)
        assert (await in_time(asking)).status == 200


async def test_a_void_batch_answers_nobody() -> None:
    async with listening() as receiver:
        asking = asyncio.create_task(call(receiver.address, b"{}"))
        (void,) = await collect(receiver, 1)
        await receiver.connect()

        await receiver.acknowledge(void)
        (again,) = await collect(receiver, 1)

        assert not asking.done()
        assert dedup_keys(messages_of([void])) == dedup_keys(messages_of([again]))
        await receiver.acknowledge(again)
        assert (await in_time(asking)).status == 200


async def test_one_connection_serves_many_requests() -> None:
    async with taking() as (receiver, taken):
        sink = sink_of(f"http://{receiver.address}{PATH}", batch_mode=False, max_in_flight=1)
        await sink.connect()
        assert not (await sink.publish(numbered(30))).failures
        await sink.aclose()
        assert await receiver.describe() == {"listening": receiver.address, "path": PATH}

    assert dedup_keys(taken) == dedup_keys(numbered(30))
