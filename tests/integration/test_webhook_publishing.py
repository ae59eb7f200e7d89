"""The webhook sink against a real server: what is sent, in which order, and what answers mean."""

from __future__ import annotations

import asyncio
import base64
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import msgspec
import pytest

from relay.backends.webhook.header import batch_key
from relay.backends.webhook.signature import sign, webhook_secret
from relay.contracts import PublishResult
from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    ErrorKind,
    MessageRejected,
    MessageTooLarge,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from relay.events import Retried
from relay.message import RelayMessage
from relay.wire import HTTP, encoder
from tests.contract.evidence import (
    SERIALIZED_FIELDS,
    assert_per_key_order,
    assert_same_message,
    complete_message,
    dedup_keys,
    numbered,
)
from tests.contract.sink_contract import deliver
from tests.contract.webhook_client import host_of, restored, sink_of
from tests.servers.finding import LOOPBACK, free_port
from tests.servers.http import OK, HttpServer, Received, Reply
from tests.servers.proxy import TcpProxy
from tests.servers.tls import TlsFiles
from tests.unit.in_memory import Line, message

Proxies = Callable[[str, int], Awaitable[TcpProxy]]
HttpsServerWith = Callable[..., Awaitable[HttpServer]]
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


async def published(
    url: str, messages: Sequence[RelayMessage], ordering: str | None = None, /, **keys: object
) -> PublishResult:
    """What becomes of these, sent by a sink with these keys."""
    sink = sink_of(url, ordering, **keys)
    await sink.connect()
    try:
        return await sink.publish(messages)
    finally:
        await sink.aclose()


def sole_error(result: PublishResult) -> RelayError:
    """The one error with which every message of a publish failed."""
    (error,) = {id(failure.error): failure.error for failure in result.failures}.values()
    return error


@pytest.mark.shows("sink:webhook.url", "sink:webhook.batch_mode")
async def test_a_batch_is_one_array_under_a_digest_of_its_keys(http_server: HttpServer) -> None:
    messages = numbered(50)

    assert not (await published(http_server.url, messages)).failures

    (request,) = http_server.received
    assert (request.method, request.path) == ("POST", "/hook")
    assert request.header("Content-Type") == "application/vnd.pgtrickle.envelope+json"
    assert request.header("Idempotency-Key") == batch_key(dedup_keys(messages))
    assert dedup_keys(restored([request])) == dedup_keys(messages)


@pytest.mark.shows("sink:webhook.format")
@pytest.mark.parametrize(
    "format_, content_type, in_array",
    [
        (
            "envelope",
            "application/vnd.pgtrickle.envelope+json",
            "application/vnd.pgtrickle.envelope+json",
        ),
        ("payload", "application/json", "application/json"),
        ("cloudevents", "application/cloudevents+json", "application/cloudevents-batch+json"),
    ],
)
async def test_each_format_has_its_content_type_and_by_itself_restores_every_field(
    http_server: HttpServer, format_: str, content_type: str, in_array: str
) -> None:
    sent = complete_message()

    await published(http_server.url, [sent], batch_mode=False, format=format_)
    await published(http_server.url, [sent], format=format_)

    alone, array = http_server.received
    assert alone.header("Content-Type") == content_type
    assert alone.header("Idempotency-Key") == sent.dedup_key
    assert_same_message(restored([alone])[0], sent, SERIALIZED_FIELDS)
    assert array.header("Content-Type") == in_array
    if format_ == "payload":
        assert msgspec.json.decode(array.body) == [msgspec.json.decode(sent.payload)]
        assert array.header("X-Pgtrickle-Format") is None


@pytest.mark.shows("sink:webhook.method", "sink:webhook.headers")
async def test_method_and_headers_are_the_operators(http_server: HttpServer) -> None:
    keys = {"method": "PUT", "headers": {"X-Api-Key": "k", "user-agent": "mine"}}

    await published(http_server.url, numbered(1), **keys)

    (request,) = http_server.received
    assert request.method == "PUT"
    assert request.header("X-Api-Key") == "k"
    assert request.header("User-Agent") == "mine"


@pytest.mark.shows("sink:webhook.bearer_token", "sink:webhook.username", "sink:webhook.password")
async def test_each_kind_of_authentication_is_sent(http_server: HttpServer) -> None:
    basic = "Basic " + base64.b64encode("me:pä:ss".encode()).decode()
    in_url = http_server.url.replace("://", "://me:p%C3%A4%3Ass@")

    await published(http_server.url, numbered(1), bearer_token="t0ken")
    await published(http_server.url, numbered(1), username="me", password="pä:ss")
    await published(in_url, numbered(1))

    found = [request.header("Authorization") for request in http_server.received]
    assert found == ["Bearer t0ken", basic, basic]


@pytest.mark.shows("sink:webhook.hmac_secret")
async def test_requests_are_signed_by_standard_webhooks(http_server: HttpServer) -> None:
    for batch_mode in (True, False):
        await published(http_server.url, numbered(1), hmac_secret=SECRET, batch_mode=batch_mode)

    for request in http_server.received:
        webhook_id, stamp = request.header("webhook-id"), request.header("webhook-timestamp")
        assert webhook_id == request.header("Idempotency-Key")
        assert webhook_id is not None
        assert stamp is not None
        assert abs(time.time() - int(stamp)) < 60
        expected = sign(webhook_secret(SECRET, "sink"), webhook_id, int(stamp), request.body)
        assert request.header("webhook-signature") == expected


@pytest.mark.shows("sink:webhook.subject_template", "sink:webhook.routing")
async def test_a_message_bears_the_subject_of_its_template_or_routing() -> None:
    sink = sink_of(
        "http://localhost/", subject_template="t.{stream_table}", routing={"delete": "gone.{key}"}
    )

    assert sink.subject_of(numbered(1)[0]) == "t.orders"
    deleted = msgspec.structs.replace(numbered(1)[0], op="delete")
    assert sink.subject_of(deleted) == "gone.k0"
    assert sink_of("http://localhost/").subject_of(deleted) == "orders.delete"


@pytest.mark.parametrize(
    "status, kind, problem",
    [
        (401, AuthenticationRefused, "answers 401 .set bearer_token"),
        (403, AuthenticationRefused, "answers 403"),
        (404, DestinationMissing, "answers 404 .correct sink.url"),
        (410, DestinationMissing, "answers 410"),
        (405, ConfigurationError, "answers 405 .set sink.method"),
        (302, ConfigurationError, "a redirect, which is not followed"),
        (503, Outage, "answers 503"),
    ],
)
@pytest.mark.parametrize("batch_mode", [True, False])
async def test_an_answer_that_concerns_everything_stops_the_sending(
    http_server: HttpServer, status: int, kind: type[RelayError], problem: str, *, batch_mode: bool
) -> None:
    http_server.judge = lambda _: Reply(status, {"Location": "/elsewhere"})

    result = await published(http_server.url, numbered(20), batch_mode=batch_mode)

    assert len(result.failures) == 20
    error = result.failures[0].error
    assert type(error) is kind
    assert len(str(error).splitlines()) == 1
    assert problem.partition(" .")[0] in str(error)
    assert len(http_server.received) == 1
    assert "elsewhere" not in [request.path for request in http_server.received]


@pytest.mark.shows("sink:webhook.retry_on_status")
async def test_the_operator_says_which_statuses_are_outages(http_server: HttpServer) -> None:
    http_server.judge = lambda _: Reply(500)

    default = await published(http_server.url, numbered(1))
    changed = await published(http_server.url, numbered(1), retry_on_status=[503])

    assert type(sole_error(default)) is Outage
    assert type(sole_error(changed)) is MessageRejected


async def test_a_refused_array_is_halved_until_the_culprits_are_found(
    http_server: HttpServer,
) -> None:
    messages = numbered(64)
    culprits = {b'"m:5"', b'"m:40"', b'"m:41"'}
    http_server.judge = lambda request: (
        Reply(400) if any(culprit in request.body for culprit in culprits) else OK
    )

    result = await published(http_server.url, messages)

    assert [failure.index for failure in result.failures] == [5, 40, 41]
    assert all(type(failure.error) is MessageRejected for failure in result.failures)
    accepted = restored(http_server.accepted)
    assert dedup_keys(accepted) == [
        message.dedup_key for index, message in enumerate(messages) if index not in (5, 40, 41)
    ]
    assert len(http_server.received) < 40


async def test_the_search_for_culprits_ends_where_everything_is_refused(
    http_server: HttpServer,
) -> None:
    http_server.judge = lambda _: Reply(400)

    result = await published(http_server.url, numbered(500))

    kinds = [failure.error.kind for failure in result.failures]
    assert len(kinds) == 500
    # Enough to tell a broken receiver by, and no flood of requests.
    assert 20 <= kinds.count(ErrorKind.MESSAGE) < 60
    assert len(http_server.received) <= 60


async def test_what_only_waited_is_told_apart_from_what_was_sent_and_failed(
    http_server: HttpServer,
) -> None:
    never = asyncio.Event()

    def judge(request: Received) -> Reply:
        if b'"m:0"' in request.body:
            return Reply(after=never)
        return Reply(503) if b'"m:3"' in request.body else OK

    http_server.judge = judge

    # The third message waits for the first, which has its key, while the fourth is refused.
    result = await published(
        http_server.url,
        numbered(4, keys=2),
        batch_mode=False,
        max_in_flight=2,
        timeout_ms=300,
    )

    assert [(failure.index, failure.was_sent) for failure in result.failures] == [
        (0, True),
        (2, False),
        (3, True),
    ]
    never.set()


async def test_what_is_left_of_a_search_for_culprits_was_not_sent(
    http_server: HttpServer,
) -> None:
    http_server.judge = lambda _: Reply(400)

    result = await published(http_server.url, numbered(500))

    for failure in result.failures:
        assert failure.was_sent == (failure.error.kind is ErrorKind.MESSAGE)


async def test_an_array_that_is_too_large_is_halved_and_the_next_ones_are_smaller(
    http_server: HttpServer,
) -> None:
    limit = 4000
    http_server.judge = lambda request: Reply(413) if len(request.body) > limit else OK
    sink = sink_of(http_server.url)
    await sink.connect()

    first = await sink.publish(numbered(64))
    refusals = len(http_server.received) - len(http_server.accepted)
    second = await sink.publish(numbered(64, start=64))

    assert not first.failures
    assert not second.failures
    assert refusals > 0
    assert len(http_server.received) - len(http_server.accepted) == refusals
    assert dedup_keys(restored(http_server.accepted)) == dedup_keys(numbered(128))
    await sink.aclose()


async def test_a_single_message_that_is_too_large_for_the_receiver_fails_alone(
    http_server: HttpServer,
) -> None:
    http_server.judge = lambda request: Reply(413) if len(request.body) > 1000 else OK
    big = RelayMessage(dedup_key="big", payload=b'"%s"' % (b"x" * 2000))

    result = await published(http_server.url, [*numbered(2), big])

    ((index, error),) = [(failure.index, failure.error) for failure in result.failures]
    assert index == 2
    assert isinstance(error, MessageTooLarge)
    assert "bytes are more than its limit" in str(error)


@pytest.mark.shows("sink:webhook.max_body_bytes")
@pytest.mark.parametrize("batch_mode", [True, False])
async def test_no_request_is_larger_than_the_operators_limit(
    http_server: HttpServer, *, batch_mode: bool
) -> None:
    big = RelayMessage(dedup_key="big", payload=b'"%s"' % (b"x" * 2000))

    result = await published(
        http_server.url, [*numbered(40), big], batch_mode=batch_mode, max_body_bytes=2000
    )

    ((index, error),) = [(failure.index, failure.error) for failure in result.failures]
    assert index == 40
    assert isinstance(error, MessageTooLarge)
    assert str(2000 - 2 * batch_mode) in str(error)
    assert max(len(request.body) for request in http_server.received) <= 2000


async def test_an_array_that_may_have_been_accepted_is_repeated_as_the_same_array(
    http_server: HttpServer,
) -> None:
    http_server.judge = lambda request: Reply(400) if b'"m:3"' in request.body else OK
    sink = sink_of(http_server.url)
    await sink.connect()
    messages = numbered(16)
    # All, the first half of it, and half of that are refused; the answer to the rest is lost.
    lost = Reply(cut="before the answer")
    http_server.replies.extend((Reply(400), Reply(400), OK, Reply(400), Reply(400), OK, lost))

    first = await sink.publish(messages)
    left = [messages[one.index] for one in first.failures if one.error.kind is ErrorKind.OUTAGE]
    second = await sink.publish([*left, *numbered(30, start=16)])

    assert not second.failures
    lost_request, repeated = http_server.accepted[-3], http_server.accepted[-2]
    assert lost_request.body == repeated.body
    assert lost_request.header("Idempotency-Key") == repeated.header("Idempotency-Key")
    await sink.aclose()


@pytest.mark.parametrize("batch_mode", [True, False])
async def test_a_receiver_that_keeps_idempotency_keys_takes_each_event_once(
    http_server: HttpServer, *, batch_mode: bool
) -> None:
    cuts = iter([True, False, False, True, False, True] + [False] * 1000)
    http_server.judge = lambda _: Reply(cut="before the answer") if next(cuts) else OK
    sink = sink_of(http_server.url, batch_mode=batch_mode)
    await sink.connect()
    messages = numbered(60, keys=5)

    for start in range(0, 60, 20):
        await deliver(sink, messages[start : start + 20])

    kept = {request.header("Idempotency-Key"): request for request in http_server.accepted}
    assert len(http_server.accepted) > len(kept)
    assert sorted(dedup_keys(restored(kept.values()))) == sorted(dedup_keys(messages))
    await sink.aclose()


def refusing(server: HttpServer, status: int, *asked: str | None) -> tuple[list[float], float]:
    """Make the server refuse so many requests, asking for these waits, None for an HTTP date.

    Gives the times of day of all its requests, and the date, which is 2 to 3 s away.
    """
    times: list[float] = []
    date = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=3)
    left = deque(asked)

    def judge(_: Received) -> Reply:
        times.append(time.time())
        if not left:
            return OK
        return Reply(status, {"Retry-After": left.popleft() or format_datetime(date, usegmt=True)})

    server.judge = judge
    return times, date.timestamp()


def line_to(url: str, count: int, **keys: object) -> Line:
    """A whole pipeline into a webhook, with a back-off of no account and so many messages."""
    line = Line(sink=sink_of(url, **keys))
    line.write(*(message(f"m:{number}", entity=f"k{number}") for number in range(count)))
    return line


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("as_date", [True, False])
@pytest.mark.parametrize("batch_mode", [True, False])
async def test_no_request_goes_out_before_the_time_that_the_receiver_named(
    http_server: HttpServer, status: int, *, as_date: bool, batch_mode: bool
) -> None:
    refusals = 1 if batch_mode else 3
    times, date = refusing(http_server, status, *[None if as_date else "1"] * refusals)
    line = line_to(http_server.url, 3, batch_mode=batch_mode)

    await line.run_to_the_end()

    welcome = date if as_date else times[refusals - 1] + 1
    assert len(times) == 2 * refusals
    # The two clocks of a machine drift apart by no more than this in a few seconds.
    assert welcome - 0.1 < times[refusals] < welcome + 20
    (retried,) = line.heard.of(Retried)
    assert f"answers {status}" in retried.error
    assert line.acknowledged == 3


async def test_of_several_answers_the_one_that_asks_for_most_patience_counts(
    http_server: HttpServer,
) -> None:
    times, _ = refusing(http_server, 429, "0", "2", "1")
    line = line_to(http_server.url, 3, batch_mode=False)

    await line.run_to_the_end()

    assert len(times) == 6
    assert 1.9 < times[3] - times[2] < 20
    (retried,) = line.heard.of(Retried)
    assert "asks for 2 s" in retried.error


@pytest.mark.parametrize("asked", ["9" * 40, "Fri, 31 Dec 9999 23:59:59 GMT", "86400"])
async def test_an_absurd_wait_is_an_hour_and_a_stop_ends_it_at_once(
    http_server: HttpServer, asked: str
) -> None:
    http_server.judge = lambda _: Reply(503, {"Retry-After": asked})
    line = line_to(http_server.url, 1)

    async with line.running():
        await line.heard.until(lambda: bool(line.heard.of(Retried)))
        (retried,) = line.heard.of(Retried)
        assert 3599 < retried.delay_s <= 3600

    assert len(http_server.received) == 1
    assert line.acknowledged == 0


@pytest.mark.parametrize("asked", ["", "soon", "-5", "1e3", "Fri, 99 Foo 2026 07:28:00 +9999"])
async def test_a_wait_that_can_not_be_read_is_none(http_server: HttpServer, asked: str) -> None:
    http_server.replies.append(Reply(503, {"Retry-After": asked}))
    line = line_to(http_server.url, 1)

    await line.run_to_the_end()

    (retried,) = line.heard.of(Retried)
    assert retried.delay_s < 1
    assert line.acknowledged == 1


async def test_what_the_receiver_refuses_for_good_is_not_waited_for(
    http_server: HttpServer,
) -> None:
    http_server.replies.append(Reply(422, {"Retry-After": "3600"}))
    line = line_to(http_server.url, 2, batch_mode=False, max_in_flight=1)

    await line.run_to_the_end()

    assert line.letters.keys == ["m:0"]
    assert line.heard.of(Retried) == []


@pytest.mark.shows("sink:webhook.timeout_ms")
async def test_an_answer_that_does_not_come_is_given_up_after_the_timeout(
    http_server: HttpServer,
) -> None:
    answering = asyncio.Event()
    http_server.judge = lambda _: Reply(after=answering)

    started = time.monotonic()
    result = await published(http_server.url, numbered(3), timeout_ms=200)

    assert isinstance(sole_error(result), TimedOut)
    assert time.monotonic() - started < 2
    answering.set()


async def test_after_a_timeout_the_next_publish_finds_a_connection(
    http_server: HttpServer,
) -> None:
    answering = asyncio.Event()
    http_server.replies.extend([Reply(after=answering)] * 3)
    sink = sink_of(http_server.url, "pipelined", batch_mode=False, max_in_flight=3, timeout_ms=200)
    await sink.connect()

    first = await sink.publish(numbered(3))
    second = await sink.publish(numbered(3))

    assert len(first.failures) == 3
    assert not second.failures
    answering.set()
    await sink.aclose()


@pytest.mark.parametrize("cut", ["in the answer", "never ends"])
async def test_what_happens_to_the_body_of_an_answer_changes_nothing(
    http_server: HttpServer, cut: str
) -> None:
    http_server.replies.extend(
        [Reply(cut="in the answer") if cut == "in the answer" else Reply(cut="never ends")] * 2
    )
    sink = sink_of(http_server.url)
    await sink.connect()

    for number in range(4):
        async with asyncio.timeout(10):
            assert not (await sink.publish(numbered(1, start=number))).failures

    assert dedup_keys(restored(http_server.received)) == dedup_keys(numbered(4))
    await sink.aclose()


async def test_a_connection_that_ends_before_the_answer_is_an_outage(
    http_server: HttpServer,
) -> None:
    http_server.replies.append(Reply(cut="before the answer"))

    result = await published(http_server.url, numbered(3))

    assert isinstance(sole_error(result), NotConnected)


async def test_a_network_cut_in_mid_batch_keeps_the_order_of_each_key(
    http_server: HttpServer, tcp_proxy: Proxies
) -> None:
    proxy = await tcp_proxy(*host_of(http_server.url))
    messages = numbered(300, keys=11)
    sink = sink_of(proxy.url(http_server.url), batch_mode=False)
    await sink.connect()

    async with asyncio.TaskGroup() as tasks:
        delivering = tasks.create_task(deliver(sink, messages))
        for count in (50, 120, 200):
            await http_server.until_received(count)
            await proxy.reset_connections()
        await delivering

    assert_per_key_order(restored(http_server.accepted), messages)
    await sink.aclose()


async def test_a_restart_of_the_receiver_in_mid_batch_loses_nothing(
    http_server: HttpServer,
) -> None:
    messages = numbered(300, keys=11)
    sink = sink_of(http_server.url, batch_mode=False)
    await sink.connect()

    async with asyncio.TaskGroup() as tasks:
        delivering = tasks.create_task(deliver(sink, messages))
        await http_server.until_received(100)
        await http_server.restart()
        await delivering

    assert_per_key_order(restored(http_server.accepted), messages)
    await sink.aclose()


@pytest.mark.shows("sink:webhook.max_in_flight")
async def test_as_many_requests_are_in_flight_as_the_operator_allows(
    http_server: HttpServer,
) -> None:
    answering = asyncio.Event()
    http_server.judge = lambda _: Reply(after=answering)
    sink = sink_of(http_server.url, batch_mode=False, max_in_flight=7)
    await sink.connect()

    publishing = asyncio.create_task(sink.publish(numbered(40, keys=40)))
    await http_server.until_received(7)
    answering.set()

    assert not (await publishing).failures
    assert http_server.most_at_once == 7
    await sink.aclose()


@pytest.mark.parametrize("ordering, at_once", [("strict", 1), ("pipelined", 5)])
async def test_messages_of_one_key_are_in_flight_together_only_where_that_was_asked_for(
    http_server: HttpServer, ordering: str, at_once: int
) -> None:
    answering = asyncio.Event()
    http_server.judge = lambda _: Reply(after=answering)
    sink = sink_of(http_server.url, ordering, batch_mode=False, max_in_flight=5)
    await sink.connect()

    publishing = asyncio.create_task(sink.publish(numbered(10, keys=1)))
    await http_server.until_received(at_once)
    answering.set()

    assert not (await publishing).failures
    assert http_server.most_at_once == at_once
    await sink.aclose()


@pytest.mark.shows("sink:webhook.tls_cert", "sink:webhook.tls_key", "sink:webhook.tls_ca")
async def test_a_client_certificate_is_shown_and_its_absence_said_to_be_refused(
    https_server_with: HttpsServerWith, tls_files: TlsFiles
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls_files.authority)
    context.load_cert_chain(tls_files.server_certificate, tls_files.server_key)
    context.verify_mode = ssl.CERT_REQUIRED
    server = await https_server_with(context)
    ours = {
        "tls_cert": str(tls_files.client_certificate),
        "tls_key": str(tls_files.client_key),
        "tls_ca": str(tls_files.authority),
    }

    accepted = await published(server.url, numbered(1), **ours)

    assert not accepted.failures
    with pytest.raises((AuthenticationRefused, NotConnected), match="set tls_cert and tls_key"):
        await published(server.url, numbered(1), tls_ca=ours["tls_ca"])


@pytest.mark.shows("sink:webhook.tls_insecure")
async def test_any_certificate_will_do_where_the_operator_says_so(
    https_server_with: HttpsServerWith, tls_files: TlsFiles
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls_files.server_certificate, tls_files.server_key)
    server = await https_server_with(context)

    assert not (await published(server.url, numbered(1), tls_insecure=True)).failures
    with pytest.raises(ConfigurationError, match=r"certificate is not trusted.*tls_ca"):
        await published(server.url, numbered(1))


async def test_tls_files_that_are_not_there_are_named_by_their_keys(
    http_server: HttpServer,
) -> None:
    with pytest.raises(ConfigurationError, match=r"TLS files can't be used.*No such file"):
        await published("https://localhost/", numbered(1), tls_ca="/nowhere/ca.pem")


@pytest.mark.parametrize(
    "url, problem",
    [
        (f"http://{LOOPBACK}:{{port}}/secret", "Connection refused"),
        ("http://nowhere.invalid/secret", "name of the host is not known"),
    ],
)
async def test_a_wrong_host_is_one_line_without_the_path(url: str, problem: str) -> None:
    with pytest.raises(NotConnected, match=problem) as caught:
        await published(url.format(port=free_port()), numbered(1))

    assert "secret" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


async def test_a_server_without_tls_is_told_apart_from_one_with_it(
    http_server: HttpServer,
) -> None:
    with pytest.raises(ConfigurationError, match="TLS failed"):
        await published(http_server.url.replace("http:", "https:"), numbered(1))


async def test_a_receiver_can_neither_set_cookies_nor_be_asked_for_anything_while_connecting(
    http_server: HttpServer,
) -> None:
    http_server.judge = lambda _: Reply(headers={"Set-Cookie": "a=b"})
    sink = sink_of(http_server.url)

    await sink.connect()
    assert await sink.is_healthy()
    assert http_server.received == []
    for _ in range(2):
        await sink.publish(numbered(1))

    assert [request.header("Cookie") for request in http_server.received] == [None, None]
    assert await sink.describe() == {
        "server": host_and_port(http_server),
        "mode": "arrays",
    }
    await sink.aclose()


def host_and_port(server: HttpServer) -> str:
    return f"{LOOPBACK}:{server.port}"


async def bare_cpu_seconds(
    server: HttpServer, arrays: Sequence[Sequence[RelayMessage]], *, at_once: int
) -> float:
    """What a bare client that encodes these and the server, both in this process, cost."""
    pending = iter(arrays)
    encode = encoder("envelope", HTTP)
    headers = {"Content-Type": "application/json", "Idempotency-Key": "x"}

    async with httpx.AsyncClient(trust_env=False) as client:

        async def send() -> None:
            for array in pending:
                body = b",".join([encode(message).body for message in array])
                body = b"[%b]" % body if len(array) > 1 else body
                response = await client.post(server.url, content=body, headers=headers)
                assert response.status_code == 200

        started = time.process_time()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(send())
        return time.process_time() - started


async def sink_cpu_seconds(
    server: HttpServer, messages: Sequence[RelayMessage], **keys: object
) -> float:
    """What the sink and the server cost for these messages, in publishes of a thousand."""
    sink = sink_of(server.url, **keys)
    await sink.connect()
    started = time.process_time()
    for start in range(0, len(messages), 1000):
        assert not (await sink.publish(messages[start : start + 1000])).failures
    elapsed = time.process_time() - started
    await sink.aclose()
    return elapsed


@pytest.mark.speed
@pytest.mark.parametrize("batch_mode, count, in_one", [(False, 1000, 1), (True, 50_000, 1000)])
async def test_the_sink_costs_at_most_twice_what_the_bare_client_costs(
    http_server: HttpServer, count: int, in_one: int, *, batch_mode: bool
) -> None:
    messages = numbered(count, keys=500)
    arrays = [messages[start : start + in_one] for start in range(0, count, in_one)]
    at_once = 1 if batch_mode else 16
    floors, ours = [], []
    for _ in range(2):
        floors.append(await bare_cpu_seconds(http_server, arrays, at_once=at_once))
        ours.append(await sink_cpu_seconds(http_server, messages, batch_mode=batch_mode))

    floor_s, ours_s = min(floors), min(ours)
    print(f"{in_one} in one: {count / ours_s:,.0f}/s of CPU, floor {count / floor_s:,.0f}/s")
    assert ours_s < 2 * floor_s
