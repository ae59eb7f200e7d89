"""Signatures against the examples that their inventors publish, and against forgeries."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

import pytest

from relay.backends.webhook.options import WebhookSourceOptions
from relay.backends.webhook.signature import Verify, sign, verifier, webhook_secret

NOW = 1_614_265_330
BODY = b'{"test": 2432232314}'
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
SVIX = {"webhook-id": ID, "webhook-timestamp": str(NOW), "webhook-signature": SIGNATURE}


def verify_of(now: float = NOW, /, **keys: object) -> Verify:
    options = {"type": "webhook", "listen_addr": ":0", **keys}
    return verifier(WebhookSourceOptions(**options), now=lambda: now)  # type: ignore[arg-type]  # keys of one test each


def hexed(secret: str, text: bytes) -> str:
    return hmac.new(secret.encode(), text, hashlib.sha256).hexdigest()


def test_the_sink_signs_as_the_example_of_standard_webhooks_does() -> None:
    assert sign(webhook_secret(SECRET, "sink"), ID, NOW, BODY) == SIGNATURE


@pytest.mark.shows("source:webhook.signature", "source:webhook.hmac_secret")
@pytest.mark.parametrize(
    "headers, reason",
    [
        (SVIX, None),
        ({name.replace("webhook", "svix"): value for name, value in SVIX.items()}, None),
        ({**SVIX, "webhook-signature": f"v1,AAAA v1a,x {SIGNATURE}"}, None),
        ({**SVIX, "webhook-signature": "v1,AAAA"}, "does not match"),
        ({**SVIX, "webhook-signature": "\udcff"}, "does not match"),
        ({**SVIX, "webhook-id": "another"}, "does not match"),
        ({**SVIX, "webhook-timestamp": str(NOW + 1)}, "does not match"),
        ({**SVIX, "webhook-timestamp": "soon"}, "malformed"),
        ({**SVIX, "webhook-timestamp": "9" * 5000}, "malformed"),
        ({"webhook-id": ID}, "is missing"),
        ({}, "is missing"),
    ],
)
def test_a_signature_of_standard_webhooks_is_checked(
    headers: Mapping[str, str], reason: str | None
) -> None:
    found = verify_of(signature="svix", hmac_secret=SECRET)(headers, BODY)

    assert (found is None) if reason is None else (found is not None and reason in found)


@pytest.mark.shows("source:webhook.signature_tolerance_s")
@pytest.mark.parametrize("distance_s", [-61, 61])
def test_a_signed_request_that_is_too_old_or_too_early_is_refused(distance_s: int) -> None:
    svix = {"signature": "svix", "hmac_secret": SECRET}

    strict = verify_of(NOW + distance_s, **svix, signature_tolerance_s=60)(SVIX, BODY)
    patient = verify_of(NOW + distance_s, **svix, signature_tolerance_s=62)(SVIX, BODY)

    assert strict is not None
    assert "60 s" in strict
    assert patient is None


def test_a_signature_of_github_is_checked_against_their_example() -> None:
    verify = verify_of(signature="github", hmac_secret="It's a Secret to Everybody")
    digest = "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"

    assert verify({"x-hub-signature-256": f"sha256={digest}"}, b"Hello, World!") is None
    assert verify({"x-hub-signature-256": f"sha256={digest}"}, b"Hello, World?") is not None
    assert verify({}, b"Hello, World!") == "the header X-Hub-Signature-256 is missing"


def test_a_signature_of_stripe_is_checked_with_its_time() -> None:
    verify = verify_of(signature="stripe", hmac_secret="whsec_stripe")
    good = hexed("whsec_stripe", b"%d." % NOW + BODY)

    assert verify({"stripe-signature": f"t={NOW},v1={good}"}, BODY) is None
    assert verify({"stripe-signature": f"t={NOW}, v0=x, v1=old, v1={good}"}, BODY) is None
    assert verify({"stripe-signature": f"t={NOW},v0={good}"}, BODY) is not None
    assert verify({"stripe-signature": f"t={NOW - 301},v1={good}"}, BODY) is not None
    assert verify({"stripe-signature": f"v1={good}"}, BODY) is not None
    assert verify({}, BODY) is not None


@pytest.mark.shows("source:webhook.signature_header")
def test_a_plain_hmac_is_found_in_the_header_of_the_senders_choice() -> None:
    digest = hmac.new(b"key", BODY, hashlib.sha256)
    hexadecimal = digest.hexdigest()
    keys = {"signature": "hmac-sha256", "hmac_secret": "key"}

    assert verify_of(**keys)({"x-signature-256": hexadecimal}, BODY) is None
    assert verify_of(**keys)({"x-signature-256": f"sha256={hexadecimal}"}, BODY) is None
    named = verify_of(**keys, signature_header="X-Shop-Hmac")
    assert named({"x-shop-hmac": hexadecimal}, BODY) is None
    assert named({"x-signature-256": hexadecimal}, BODY) == "the header X-Shop-Hmac is missing"


def test_without_a_scheme_nothing_is_asked_for() -> None:
    assert verify_of()({}, BODY) is None
