"""The keys of a webhook sink and source: what fits together, and what is said where it does not."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from relay.backends.webhook import WebhookSink, WebhookSource
from relay.errors import ConfigurationError
from tests.contract.surroundings import backend_context
from tests.contract.webhook_client import sink_of

URL = "https://example.org/secret-path"


@pytest.mark.shows(
    "sink:webhook.type", "sink:webhook.tls", "sink:webhook.password", "sink:webhook.tls_key"
)
@pytest.mark.parametrize(
    "keys, problem",
    [
        ({"methd": "POST"}, r"sink\.methd is not a known key \(did you mean method\?\)"),
        ({"method": "GET"}, r"sink\.method: .*use one of POST, PUT, PATCH"),
        ({"url": "ftp://example.org/"}, r"sink\.url is not an HTTP address"),
        ({"url": "https://"}, r"sink\.url is not an HTTP address"),
        ({"url": "https://host:port/"}, r"sink\.url is not an HTTP address"),
        ({"url": "http://example.org", "tls": True}, r"sink\.tls is set, but sink\.url is without"),
        ({"timeout_ms": 0}, r"sink\.timeout_ms must be at least 1"),
        ({"max_in_flight": 0}, r"sink\.max_in_flight must be at least 1"),
        ({"max_body_bytes": 0}, r"sink\.max_body_bytes must be at least 1"),
        ({"username": "me"}, "username and password together"),
        ({"username": "a", "password": "b", "bearer_token": "c"}, "choose one"),
        ({"url": "https://a:b@example.org", "bearer_token": "c"}, "choose one"),
        ({"bearer_token": "Ä"}, "no header can carry"),
        ({"tls_cert": "a.pem"}, "tls_cert and tls_key together"),
        ({"retry_on_status": [200]}, r"retry_on_status must be from 400 to 599, but is 200"),
        ({"headers": {"a b": "c"}}, r"headers has 'a b'"),
        ({"headers": {"a": "b\r\nc: d"}}, r"headers has 'a'"),
        ({"hmac_secret": "plain"}, r"whsec_"),
        ({"hmac_secret": "whsec_"}, r"whsec_"),
        ({"format": "xml"}, "use one of envelope, payload, cloudevents"),
        ({"subject_template": "{nonsense}"}, r"unknown variable"),
    ],
)
def test_a_sink_with_keys_that_make_no_sense_is_refused(
    keys: Mapping[str, object], problem: str
) -> None:
    options = {"type": "webhook", "url": URL, **keys}

    with pytest.raises(ConfigurationError, match=problem) as caught:
        WebhookSink.from_options(options, backend_context())

    assert "secret-path" not in str(caught.value)


@pytest.mark.shows(
    "source:webhook.type", "source:webhook.tls", "source:webhook.tls_key", "source:webhook.path"
)
@pytest.mark.parametrize(
    "keys, problem",
    [
        ({"pth": "/"}, r"source\.pth is not a known key \(did you mean path\?\)"),
        ({"listen_addr": "8080"}, "is not host:port"),
        ({"listen_addr": "::1:8080"}, "is not host:port"),
        ({"listen_addr": "host:70000"}, "is not host:port"),
        ({"path": "hooks"}, "is not a path"),
        ({"path": "/hooks?x=1"}, "is not a path"),
        ({"auth_header": "X-Token"}, "auth_header needs auth_value"),
        ({"auth_value": ""}, "anybody could send that"),
        ({"signature": "github"}, "signature and hmac_secret together"),
        ({"hmac_secret": "x"}, "signature and hmac_secret together"),
        ({"signature": "github", "hmac_secret": ""}, "anybody could sign"),
        ({"signature": "svix", "hmac_secret": "plain"}, "whsec_"),
        ({"signature": "md5", "hmac_secret": "x"}, "hmac-sha256, github, stripe, svix"),
        (
            {"signature": "github", "hmac_secret": "x", "signature_header": "X"},
            "belongs to the signature hmac-sha256",
        ),
        ({"tls": True}, "set tls_cert and tls_key"),
        ({"tls_ca": "ca.pem"}, "set tls_cert and tls_key"),
        ({"tls_cert": "a.pem"}, "tls_cert and tls_key together"),
        ({"max_body_bytes": 0}, "must be at least 1"),
        ({"answer_timeout_ms": 0}, "must be at least 1"),
        ({"signature_tolerance_s": 0}, "must be at least 1"),
    ],
)
def test_a_source_with_keys_that_make_no_sense_is_refused(
    keys: Mapping[str, object], problem: str
) -> None:
    options = {"type": "webhook", "listen_addr": "127.0.0.1:0", **keys}

    with pytest.raises(ConfigurationError, match=problem):
        WebhookSource.from_options(options, backend_context(direction="reverse"))


def test_pipelined_ordering_is_refused_where_it_would_have_no_effect() -> None:
    with pytest.raises(ConfigurationError, match="no effect on batch_mode"):
        sink_of(URL, "pipelined")
    sink_of(URL, "pipelined", batch_mode=False)
