"""The keys of the RabbitMQ backend: what is refused, and in which words; what a key may be."""

from __future__ import annotations

import pytest

from relay.backends.rabbitmq import RabbitSink, RabbitSource
from relay.backends.rabbitmq.options import MAX_NAME_BYTES, RabbitSinkOptions, endpoint_of
from relay.backends.rabbitmq.routing_key import check_routing_key, escape
from relay.errors import ConfigurationError, MessageTooLarge, NameInvalid, TemplateInvalid
from relay.message import RelayMessage
from tests.contract.surroundings import backend_context

COMMON: dict[str, object] = {"type": "rabbitmq", "url": "amqp://localhost:5672"}
SINK: dict[str, object] = {**COMMON, "exchange": "events"}
SOURCE: dict[str, object] = {**COMMON, "queue": "orders"}


def make_sink(**keys: object) -> RabbitSink:
    return RabbitSink.from_options({**SINK, **keys}, backend_context())


def make_source(**keys: object) -> RabbitSource:
    return RabbitSource.from_options({**SOURCE, **keys}, backend_context(direction="reverse"))


@pytest.mark.shows("sink:rabbitmq.type")
@pytest.mark.parametrize(
    "keys, words",
    [
        ({"type": None}, "type"),
        ({"url": None}, "url"),
        ({"url": "http://x"}, "write amqp://host:5672/vhost"),
        ({"url": "amqp://host:x"}, "write amqp://host:5672/vhost"),
        ({"url": "amqp://host?heartbeat=1"}, "as keys of their own"),
        ({"url": "amqp://a:b@host", "username": "c", "password": "d"}, "in its url and beside it"),
        ({"url": "amqp://host/a", "vhost": "b"}, "vhost in its url and beside it"),
        ({"username": "me"}, "username and password together"),
        ({"tls_cert": "x"}, "tls_cert and tls_key together"),
        ({"timeout_ms": 0}, "timeout_ms must be at least 1"),
        ({"exchnage": "x"}, "did you mean exchange"),
        ({"exchange": ""}, "exchange is missing"),
        ({"exchange": "x" * 256}, "the limit is 255 bytes"),
        ({"exchange_type": "fanout"}, "needs declare_exchange"),
        (
            {"exchange": "", "declare_exchange": True, "routing_key_template": "q"},
            "declare_exchange needs a name",
        ),
        ({"max_in_flight": 0}, "max_in_flight must be at least 1"),
        ({"max_message_bytes": 0}, "max_message_bytes must be at least 1"),
        ({"confirm_timeout_ms": 0}, "confirm_timeout_ms must be at least 1"),
        ({"format": "xml"}, "use one of envelope, payload, cloudevents"),
        ({"routing_key_template": "a.{sream_table}"}, "did you mean {stream_table}"),
        ({"routing": {"x": "y" * 256}}, "the limit is 255 bytes"),
    ],
)
def test_a_wrong_sink_key_is_said_in_words(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_sink(**keys)


@pytest.mark.shows("source:rabbitmq.type")
@pytest.mark.parametrize(
    "keys, words",
    [
        ({"type": None}, "type"),
        ({"queue": None}, "queue"),
        ({"queue": ""}, "queue is empty"),
        ({"queue": "q" * 256}, "the limit is 255 bytes"),
        ({"que": "a"}, "did you mean queue"),
        ({"prefetch_count": 0}, "prefetch_count must be from 1 to 65535"),
        ({"prefetch_count": 65536}, "prefetch_count must be from 1 to 65535"),
        ({"exclusive": "perhaps"}, "exclusive"),
    ],
)
def test_a_wrong_source_key_is_said_in_words(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_source(**keys)


def test_an_unknown_template_variable_is_a_template_error() -> None:
    with pytest.raises(TemplateInvalid):
        make_sink(routing_key_template="{nothing}")


def test_a_url_is_taken_apart_and_its_credentials_decoded() -> None:
    endpoint, vhost = endpoint_of(
        RabbitSinkOptions(type="rabbitmq", url="amqps://us%40er:p%2Fw@[::1]:7000/a%2Fb"), "sink"
    )

    assert (endpoint.address, vhost, endpoint.is_tls) == ("[::1]:7000", "a/b", True)
    assert (endpoint.username, endpoint.password) == ("us@er", "p/w")


@pytest.mark.parametrize(
    "url, keys, port, vhost",
    [
        ("amqp://host", {}, 5672, "/"),
        ("amqp://host/", {}, 5672, "/"),
        ("amqp://host/%2F", {}, 5672, "/"),
        ("amqps://host/v", {}, 5671, "v"),
        ("amqp://host", {"tls": True, "vhost": "w"}, 5671, "w"),
    ],
)
def test_port_and_virtual_host_have_the_usual_defaults(
    url: str, keys: dict[str, object], port: int, vhost: str
) -> None:
    options = RabbitSinkOptions(type="rabbitmq", url=url, **keys)  # type: ignore[arg-type]  # one mapping for all

    endpoint, found = endpoint_of(options, "sink")

    assert (endpoint.port, found) == (port, vhost)


def test_no_error_about_a_url_repeats_its_password() -> None:
    for url in ("amqp://me:hunter2@host:port", "amqp://me:hunter2@host?x=1", "x://:hunter2@host"):
        with pytest.raises(ConfigurationError) as caught:
            make_sink(url=url)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "value, escaped",
    [
        ("orders", "orders"),
        ("a.b", "a%2Eb"),
        ("*#", "%2A%23"),
        ("50% of\n", "50%25%20of%0A"),
        ("ä🦊", "ä🦊"),
        ("", "_"),
        ("_", "%5F"),
        ("a\ud800", "a%ED%A0%80"),
    ],
)
def test_a_value_adds_no_word_and_no_wildcard_to_a_routing_key(value: str, escaped: str) -> None:
    assert escape(value) == escaped


def test_a_routing_key_that_is_none_is_refused_and_the_limit_named() -> None:
    with pytest.raises(NameInvalid):
        check_routing_key("a\ud800")
    with pytest.raises(MessageTooLarge, match=str(MAX_NAME_BYTES)):
        check_routing_key("ä" * 128)
    assert check_routing_key("ä" * 127)


def test_the_routing_key_of_a_message_is_by_default_named_after_its_table() -> None:
    message = RelayMessage(dedup_key="1", payload=b"{}", stream_table="Order lines", op="insert")

    assert make_sink().subject_of(message) == "pgtrickle.Order%20lines.insert"
