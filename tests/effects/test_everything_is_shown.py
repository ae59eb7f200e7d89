"""No setting, no key of a pipeline or a backend, no metric and no error class is without effect.

Each must be named by the marker of a test that changes it and sees a difference; whoever adds one
adds such a test, or this file fails and names what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from relay.errors import ConfigurationError
from relay.pipeline_config import parse_config
from tests.effects.evidence import error_classes, everything, raised, shown

# Keys that are known and refused, with what they wait for.
NOT_YET: Mapping[str, str] = {
    "pipeline:parallelism": "consumer groups in the relay",
    "pipeline:visibility_seconds": "consumer groups in the relay",
    "source:outbox.consumer_group": "consumer groups in the relay",
}
# Never raised itself: what all others are, and what callers catch.
ROOTS = {"RelayError"}

FORWARD: Mapping[str, object] = {
    "source_type": "outbox",
    "source": {"outbox": "orders"},
    "sink_type": "stdout",
    "sink": {"type": "stdout"},
}


def test_every_setting_key_metric_and_error_has_an_effect_that_a_test_shows() -> None:
    without_effect = everything() - shown().keys() - NOT_YET.keys()

    assert sorted(without_effect) == []


def test_no_marker_names_what_does_not_exist() -> None:
    known = everything()
    stale = {name: tests for name, tests in shown().items() if name not in known}

    assert stale == {}


def test_what_has_no_effect_yet_exists_and_has_none() -> None:
    assert NOT_YET.keys() <= everything()
    assert not NOT_YET.keys() & shown().keys()


@pytest.mark.parametrize(
    "changed",
    [
        {"parallelism": 2},
        {"visibility_seconds": 60},
        {"source": {"outbox": "orders", "consumer_group": "g"}},
    ],
)
def test_a_key_without_effect_is_refused_and_never_ignored(changed: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=r"is not available in 0\.29\.0"):
        parse_config("forward", {**FORWARD, **changed})


def test_every_error_class_is_raised_somewhere() -> None:
    assert error_classes() - raised() == ROOTS
