"""The keys of the NATS backend: what is refused, and in which words."""

from __future__ import annotations

import pytest

from relay.backends.nats import NatsSink, NatsSource
from relay.backends.nats.options import durable_for, servers_of
from relay.errors import ConfigurationError, TemplateInvalid
from tests.contract.surroundings import backend_context

SINK: dict[str, object] = {"type": "nats", "url": "nats://localhost:4222"}
SOURCE: dict[str, object] = {**SINK, "subject": "orders.>"}


def make_sink(**keys: object) -> NatsSink:
    return NatsSink.from_options({**SINK, **keys}, backend_context())


def make_source(**keys: object) -> NatsSource:
    return NatsSource.from_options({**SOURCE, **keys}, backend_context(direction="reverse"))


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"subject_templat": "a"}, "did you mean subject_template"),
        ({"url": ""}, "url is empty"),
        ({"url": "ws://host"}, "not a NATS address"),
        ({"url": "nats://host:port"}, "not a NATS address"),
        ({"url": "nats://:4222"}, "not a NATS address"),
        ({"user": "a"}, "user and password together"),
        ({"token": "a", "nkey_seed": "b"}, "both token and nkey_seed"),
        ({"tls_cert": "a.pem"}, "tls_cert and tls_key together"),
        ({"stream": "a.b"}, "not a name"),
        ({"create_stream": True}, "create_stream needs stream"),
        ({"max_in_flight": 0}, "max_in_flight must be at least 1"),
        ({"ack_timeout_ms": 0}, "ack_timeout_ms must be at least 1"),
        ({"duplicate_window_s": 0}, "duplicate_window_s must be at least 1"),
        ({"format": "xml"}, "use one of envelope, payload, cloudevents"),
        ({"subject_template": "a.{sream_table}"}, "did you mean {stream_table}"),
        ({"subject_template": "a..{op}"}, "empty token"),
        ({"routing": {"x": "a.*"}}, "wildcard"),
        (
            {"subject_template": "{op}", "stream": "a", "create_stream": True},
            "create the stream yourself",
        ),
    ],
)
def test_a_wrong_sink_key_is_said_in_words(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_sink(**keys)


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"subject": None}, "subject"),
        ({"deliver_policy": "first"}, "deliver_policy"),
        ({"durable_name": "a b"}, "not a name"),
        ({"stream": ""}, "not a name"),
        ({"ack_wait_seconds": 0.5}, "ack_wait_seconds must be at least 1"),
        ({"max_deliver": 0}, "max_deliver must be positive"),
        ({"durable": "a"}, "did you mean durable_name"),
    ],
)
def test_a_wrong_source_key_is_said_in_words(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_source(**keys)


def test_an_unknown_template_variable_is_a_template_error() -> None:
    with pytest.raises(TemplateInvalid):
        make_sink(subject_template="{nothing}")


def test_a_list_of_urls_is_split_and_its_credentials_decoded() -> None:
    first, second = servers_of("nats://us%40er:p%2Fw@one , tls://[::1]:5222", "sink")

    assert (first.address, first.username, first.password) == ("one:4222", "us@er", "p/w")
    assert (second.address, second.is_tls) == ("[::1]:5222", True)


def test_no_error_about_a_url_repeats_its_password() -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_sink(url="nats://me:hunter2@host:port")

    assert "hunter2" not in str(caught.value)


def test_pipelines_with_similar_names_get_different_consumers() -> None:
    names = {durable_for(name) for name in ("a.b", "a_b", "a b", "a/b", "x" * 80, "x" * 81)}

    assert len(names) == 6
    assert durable_for("orders-in") == "orders-in"
