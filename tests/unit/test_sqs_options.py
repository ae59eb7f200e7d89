"""The keys of the SQS backend: what is refused, and in which words; and what they mean."""

from __future__ import annotations

import pytest

from relay.backends.sqs import SqsSink, SqsSource
from relay.backends.sqs.identifier import deduplication_id, escape, group_id
from relay.backends.sqs.options import SqsSinkOptions, target_of
from relay.errors import ConfigurationError, MessageUndecodable, TemplateInvalid
from relay.message import RelayMessage
from tests.contract.surroundings import backend_context

URL = "https://sqs.eu-central-1.amazonaws.com/123456789012/orders.fifo"
OPTIONS: dict[str, object] = {"type": "sqs", "queue_url": URL}


def make_sink(**keys: object) -> SqsSink:
    return SqsSink.from_options({**OPTIONS, **keys}, backend_context())


def make_source(**keys: object) -> SqsSource:
    return SqsSource.from_options({**OPTIONS, **keys}, backend_context(direction="reverse"))


@pytest.mark.shows("sink:sqs.type")
@pytest.mark.parametrize(
    "keys, words",
    [
        ({"type": None}, "type"),
        ({"queue": "a"}, "did you mean queue_url"),
        ({"queue_url": "orders"}, "sink.queue_url is not an HTTP address"),
        ({"queue_url": "https://host:port/a"}, "not an HTTP address"),
        ({"queue_url": "https://me:hunter2@host/a"}, "has credentials in it"),
        ({"queue_url": "https://host/"}, "names no queue"),
        ({"endpoint_url": "ftp://host"}, "sink.endpoint_url is not an HTTP address"),
        ({"access_key_id": "a"}, "access_key_id and secret_access_key together"),
        ({"secret_access_key": "a"}, "access_key_id and secret_access_key together"),
        ({"session_token": "a"}, "session_token needs"),
        ({"tls_cert": "a.pem"}, "tls_cert and tls_key together"),
        ({"tls_insecure": True, "tls_ca": "a.pem"}, "both tls_ca and tls_insecure"),
        ({"timeout_ms": 0}, "timeout_ms must be at least 1"),
        ({"max_in_flight": 0}, "max_in_flight must be at least 1"),
        ({"max_message_bytes": 0}, "max_message_bytes must be from 1 to 1048576"),
        ({"max_message_bytes": 2_000_000}, "max_message_bytes must be from 1 to 1048576"),
        ({"message_group_id": ""}, "message_group_id is empty"),
        ({"message_group_id": "{kee}"}, "did you mean {key}"),
        ({"format": "xml"}, "use one of envelope, payload, cloudevents"),
    ],
)
def test_a_wrong_sink_key_is_said_in_words(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        make_sink(**keys)
    assert "hunter2" not in str(caught.value)


@pytest.mark.shows("source:sqs.type")
@pytest.mark.parametrize(
    "keys, words",
    [
        ({"type": None}, "type"),
        ({"queue_url": None}, "queue_url"),
        ({"visibility": 3}, "did you mean visibility_timeout"),
        ({"visibility_timeout": 0}, "visibility_timeout must be from 1 to 43200"),
        ({"visibility_timeout": 43_201}, "visibility_timeout must be from 1 to 43200"),
        ({"wait_time_seconds": 0}, "wait_time_seconds must be from 1 to 20"),
        ({"wait_time_seconds": 21}, "wait_time_seconds must be from 1 to 20"),
        ({"message_group_id": "a"}, "message_group_id is not a known key"),
    ],
)
def test_a_wrong_source_key_is_said_in_words(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_source(**keys)


def test_an_unknown_template_variable_is_a_template_error() -> None:
    with pytest.raises(TemplateInvalid):
        make_sink(subject_template="{nothing}")


def test_the_subject_of_a_message_is_by_template_or_routing() -> None:
    message = RelayMessage(dedup_key="1", payload=b"{}", stream_table="orders", op="delete")

    assert make_sink().subject_of(message) == "pgtrickle.orders.delete"
    assert make_sink(routing={"delete": "gone"}).subject_of(message) == "gone"


@pytest.mark.parametrize(
    "url, region, endpoint",
    [
        (URL, "eu-central-1", "https://sqs.eu-central-1.amazonaws.com"),
        ("https://eu-west-1.queue.amazonaws.com/1/q", "eu-west-1", None),
        ("https://vpce-0a-1b.sqs.us-east-2.vpce.amazonaws.com/1/q", "us-east-2", None),
        ("https://sqs-fips.us-gov-west-1.amazonaws.com/1/q", "us-gov-west-1", None),
        ("https://sqs.cn-north-1.amazonaws.com.cn/1/q", "cn-north-1", None),
        ("http://sqs.eu-west-3.localhost.localstack.cloud:4566/0/q", "eu-west-3", None),
        ("http://localhost:5000/0/q", None, "http://localhost:5000"),
    ],
)
def test_region_and_endpoint_follow_from_the_queues_address(
    url: str, region: str | None, endpoint: str | None
) -> None:
    target = target_of(SqsSinkOptions(type="sqs", queue_url=url), "sink")

    assert target.region == region
    assert endpoint is None or target.endpoint_url == endpoint


def test_what_is_said_wins_over_what_follows_from_the_address() -> None:
    options = SqsSinkOptions(
        type="sqs", queue_url=URL, region="us-east-1", endpoint_url="http://localhost:1"
    )

    target = target_of(options, "sink")

    assert (target.region, target.endpoint_url, target.host) == (
        "us-east-1",
        "http://localhost:1",
        "localhost:1",
    )
    assert target.queue_url == URL


@pytest.mark.parametrize(
    "value, escaped",
    [
        ("orders:7", "orders:7"),
        ("a b\n", "a%20b%0A"),
        ("50%", "50%25"),
        ("🦊", "%F0%9F%A6%8A"),
        ("", "_"),
        ("_", "%5F"),
        ("a\ud800", "a%ED%A0%80"),
    ],
)
def test_a_value_adds_only_legal_characters_to_a_group_id(value: str, escaped: str) -> None:
    assert escape(value) == escaped
    assert group_id(escaped) == escaped


def test_a_group_id_that_is_too_long_or_illegal_is_shortened_the_same_way_each_time() -> None:
    long = "k" * 129

    assert group_id("k" * 128) == "k" * 128
    assert len(group_id(long)) == 64
    assert group_id(long) == group_id(long) != group_id(long + "k")
    assert group_id("my group") == "my%20group"


def test_a_dedup_key_that_sqs_does_not_take_goes_as_its_digest() -> None:
    assert deduplication_id("outbox_orders:7:0") == "outbox_orders:7:0"
    for key in ("k" * 129, "a b", "🦊", ""):
        assert len(deduplication_id(key)) == 64
    assert deduplication_id("a b") != deduplication_id("a  b")
    with pytest.raises(MessageUndecodable):
        deduplication_id("a\ud800")
