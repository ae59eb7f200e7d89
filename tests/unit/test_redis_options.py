"""The keys of the Redis backend: what is refused, and in which words; and what a key may be."""

from __future__ import annotations

import pytest

from relay.backends.redis import RedisSink, RedisSource
from relay.backends.redis.key import MAX_KEY_BYTES, check_key, escape
from relay.backends.redis.options import RedisSinkOptions, endpoint_of
from relay.errors import ConfigurationError, MessageTooLarge, NameInvalid, TemplateInvalid
from relay.message import RelayMessage
from tests.contract.surroundings import backend_context

SINK: dict[str, object] = {"type": "redis", "url": "redis://localhost:6379"}
SOURCE: dict[str, object] = {**SINK, "stream_key": "orders"}


def make_sink(**keys: object) -> RedisSink:
    return RedisSink.from_options({**SINK, **keys}, backend_context())


def make_source(**keys: object) -> RedisSource:
    return RedisSource.from_options({**SOURCE, **keys}, backend_context(direction="reverse"))


@pytest.mark.shows("sink:redis.type")
@pytest.mark.parametrize(
    "keys, words",
    [
        ({"type": None}, "type"),
        ({"stream_ky": "a"}, "did you mean stream_key"),
        ({"url": ""}, "not a Redis address"),
        ({"url": "http://host"}, "not a Redis address"),
        ({"url": "redis://host:port"}, "not a Redis address"),
        ({"url": "redis://:6379"}, "not a Redis address"),
        ({"url": "redis://host/orders"}, "not the number of a database"),
        ({"url": "redis://host?db=1"}, "has a query"),
        ({"url": "redis://host/1", "db": 2}, "db in its url and beside it"),
        ({"url": "redis://:a@host", "password": "b"}, "password in its url and beside it"),
        ({"username": "me"}, "username needs a password"),
        ({"db": -1}, "db must not be negative"),
        ({"tls_cert": "a.pem"}, "tls_cert and tls_key together"),
        ({"timeout_ms": 0}, "timeout_ms must be at least 1"),
        ({"maxlen": 0}, "maxlen must be at least 1"),
        ({"max_message_bytes": 0}, "max_message_bytes must be at least 1"),
        ({"wait_replicas": -1}, "wait_replicas must not be negative"),
        ({"format": "xml"}, "use one of envelope, payload, cloudevents"),
        ({"stream_key": "a:{sream_table}"}, "did you mean {stream_table}"),
        ({"stream_key": ""}, "stream_key is empty"),
        ({"routing": {"x": " "}}, "template is empty"),
    ],
)
def test_a_wrong_sink_key_is_said_in_words(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_sink(**keys)


@pytest.mark.shows("source:redis.type")
@pytest.mark.parametrize(
    "keys, words",
    [
        ({"type": None}, "type"),
        ({"stream_key": None}, "stream_key"),
        ({"stream_key": ""}, "the stream key is empty"),
        ({"group": "a"}, "did you mean group_name"),
        ({"group_name": ""}, "group_name is empty"),
        ({"consumer_name": ""}, "consumer_name is empty"),
        ({"payload_field": ""}, "payload_field is empty"),
        ({"start_id": "first"}, "not an id of a stream"),
        ({"block_ms": 0}, "block_ms must be from 1 to 1000"),
        ({"block_ms": 2000}, "block_ms must be from 1 to 1000"),
        ({"count": 0}, "count must be at least 1"),
        ({"claim_idle_ms": 10}, "claim_idle_ms must be at least 1000"),
    ],
)
def test_a_wrong_source_key_is_said_in_words(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_source(**keys)


def test_an_unknown_template_variable_is_a_template_error() -> None:
    with pytest.raises(TemplateInvalid):
        make_sink(stream_key="{nothing}")


def test_a_url_is_taken_apart_and_its_credentials_decoded() -> None:
    endpoint, db = endpoint_of(
        RedisSinkOptions(type="redis", url="rediss://us%40er:p%2Fw@[::1]:7000/3"), "sink"
    )

    assert (endpoint.address, db, endpoint.is_tls) == ("[::1]:7000", 3, True)
    assert (endpoint.username, endpoint.password) == ("us@er", "p/w")


def test_no_error_about_a_url_repeats_its_password() -> None:
    for url in ("redis://me:hunter2@host:port", "redis://me:hunter2@host/x", "x://:hunter2@host"):
        with pytest.raises(ConfigurationError) as caught:
            make_sink(url=url)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "value, escaped",
    [
        ("orders", "orders"),
        ("a:b", "a%3Ab"),
        ("*?[x]", "%2A%3F%5Bx%5D"),
        ("{tag}", "%7Btag%7D"),
        ("50% of\n", "50%25%20of%0A"),
        ("ä🦊", "ä🦊"),
        ("", "_"),
        ("_", "%5F"),
        ("a\ud800", "a%ED%A0%80"),
    ],
)
def test_a_value_adds_no_segment_no_pattern_and_no_tag_to_a_key(value: str, escaped: str) -> None:
    assert escape(value) == escaped


def test_a_key_that_is_none_is_refused_and_the_limit_named() -> None:
    for key in ("", "a\ud800"):
        with pytest.raises(NameInvalid):
            check_key(key)
    with pytest.raises(MessageTooLarge, match=str(MAX_KEY_BYTES)):
        check_key("ä" * MAX_KEY_BYTES)


def test_the_stream_of_a_message_is_by_default_named_after_its_table() -> None:
    message = RelayMessage(dedup_key="1", payload=b"{}", stream_table="Order lines")

    assert make_sink().subject_of(message) == "pgtrickle:Order%20lines"
