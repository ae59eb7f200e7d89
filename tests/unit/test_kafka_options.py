"""The keys of the Kafka backend: what is refused, and in which words; and what a topic may be."""

from __future__ import annotations

import pytest

from relay.backends.kafka import KafkaSink, KafkaSource
from relay.backends.kafka.options import KafkaSinkOptions, addresses_of, mechanism_of
from relay.backends.kafka.topic import check_topic, escape
from relay.errors import ConfigurationError, NameInvalid
from relay.message import RelayMessage
from tests.contract.surroundings import backend_context

COMMON: dict[str, object] = {"type": "kafka", "brokers": "localhost:9092", "topic": "orders"}


def make_sink(**keys: object) -> KafkaSink:
    given = {name: value for name, value in {**COMMON, **keys}.items() if value != "absent"}
    return KafkaSink.from_options(given, backend_context())


def make_source(**keys: object) -> KafkaSource:
    given = {name: value for name, value in {**COMMON, **keys}.items() if value != "absent"}
    return KafkaSource.from_options(given, backend_context(direction="reverse"))


BOTH = [
    ({"type": None}, "type"),
    ({"brokers": "absent"}, "brokers is missing"),
    ({"brokers": ""}, "brokers is empty"),
    ({"brokers": []}, "brokers is empty"),
    ({"brokers": "a b"}, "has an entry that is not an address"),
    ({"brokers": "h:99999"}, "has an entry that is not an address"),
    ({"brokers": "u:p@h:1"}, "has an entry that is not an address"),
    ({"broker": "h"}, "did you mean brokers"),
    ({"tls_cert": "a.pem"}, "tls_cert and tls_key together"),
    ({"sasl_username": "me"}, "sasl_username and sasl_password together"),
    ({"sasl_password": "p"}, "sasl_username and sasl_password together"),
    ({"sasl_mechanism": "PLAIN"}, "sasl_mechanism needs"),
    ({"sasl_mechanism": "GSSAPI"}, "use one of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512"),
    ({"request_timeout_ms": 0}, "request_timeout_ms must be at least 1"),
    ({"client": {"acks": 0}}, "client.acks is not a known key"),
    ({"client": {"max_idle_ms": "x"}}, "client.max_idle_ms is not of type int"),
]


@pytest.mark.shows("sink:kafka.type")
@pytest.mark.parametrize(
    "keys, words",
    [
        *BOTH,
        ({"topic": "absent"}, "topic or topic_template, and not both"),
        ({"topic_template": "a"}, "has both topic and topic_template"),
        ({"topic": "a.{op}"}, "write it as topic_template"),
        ({"topic": "a b"}, "no topic can be made"),
        ({"topic": "absent", "topic_template": ""}, "topic_template is empty"),
        ({"topic": "absent", "topic_template": "{sream_table}"}, "did you mean {stream_table}"),
        ({"routing": {"insert": "a/b"}}, "no topic can be made"),
        ({"key_template": "{ky}"}, "did you mean {key}"),
        ({"acks": "0"}, "use one of all, 1"),
        ({"compression": "lzma"}, "use one of none, gzip, snappy, lz4, zstd"),
        ({"linger_ms": -1}, "linger_ms must not be negative"),
        ({"max_request_size": 0}, "max_request_size must be at least 1"),
        ({"format": "xml"}, "use one of envelope, payload, cloudevents"),
    ],
)
def test_a_wrong_sink_key_is_said_in_words(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_sink(**keys)


@pytest.mark.shows("source:kafka.type")
@pytest.mark.parametrize(
    "keys, words",
    [
        *BOTH,
        ({"topic": "absent"}, "topic is missing"),
        ({"topic": []}, "source.topic is empty"),
        ({"topic": ["a", "a"]}, "has 'a' twice"),
        ({"topic": "a b"}, "can't be the name of a Kafka topic"),
        ({"group_id": ""}, "group_id is empty"),
        ({"auto_offset_reset": "none"}, "use one of earliest, latest"),
        ({"on_position_lost": "skip"}, "use one of fail, earliest, latest"),
        ({"isolation_level": "serializable"}, "use one of read_committed, read_uncommitted"),
        ({"session_timeout_ms": 0}, "session_timeout_ms must be at least 1"),
        ({"rebalance_timeout_ms": 0}, "rebalance_timeout_ms must be at least 1"),
        ({"fetch_max_bytes": 0}, "fetch_max_bytes must be at least 1"),
    ],
)
def test_a_wrong_source_key_is_said_in_words(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_source(**keys)


def test_brokers_are_written_in_several_ways() -> None:
    def addresses(brokers: str | list[str]) -> list[str]:
        return addresses_of(KafkaSinkOptions(type="kafka", brokers=brokers), "sink")

    assert addresses("a, b:1,") == ["a:9092", "b:1"]
    assert addresses(["kafka://a:2/", "SASL_SSL://[::1]:3"]) == ["a:2", "[::1]:3"]


def test_a_user_without_a_mechanism_logs_in_by_scram() -> None:
    options = KafkaSinkOptions(type="kafka", brokers="h", sasl_username="u", sasl_password="p")

    assert mechanism_of(options) == "SCRAM-SHA-512"
    assert mechanism_of(KafkaSinkOptions(type="kafka", brokers="h")) is None


@pytest.mark.parametrize(
    "value,escaped",
    [
        ("orders", "orders"),
        ("Order lines", "Order_lines"),
        ("a.b/c", "a_b_c"),
        ("..", "__"),
        ("", "_"),
        ("🦊", "_"),
        ("a\x00\n", "a__"),
    ],
)
def test_a_value_can_not_add_a_segment_to_a_topic(value: str, escaped: str) -> None:
    sink = make_sink(topic="absent", topic_template="base.{key}")

    assert escape(value) == escaped
    assert sink.subject_of(RelayMessage(dedup_key="1", payload=b"{}", key=value)) == (
        f"base.{escaped}"
    )


@pytest.mark.parametrize("topic", ["", ".", "..", "a b", "a/b", "ä", "t" * 250])
def test_what_kafka_refuses_is_no_topic(topic: str) -> None:
    with pytest.raises(NameInvalid):
        check_topic(topic)
