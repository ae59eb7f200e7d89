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

# Never raised itself: what all others are, and what callers catch.
ROOTS = {"RelayError"}

FORWARD: Mapping[str, object] = {
    "source_type": "outbox",
    "source": {"outbox": "orders"},
    "sink_type": "stdout",
    "sink": {"type": "stdout"},
}


def test_every_setting_key_metric_and_error_has_an_effect_that_a_test_shows() -> None:
    without_effect = everything() - shown().keys()

    assert sorted(without_effect) == []


def test_no_marker_names_what_does_not_exist() -> None:
    known = everything()
    stale = {name: tests for name, tests in shown().items() if name not in known}

    assert stale == {}


@pytest.mark.parametrize("key", ["parallelism", "visibility_seconds"])
def test_a_key_of_consumer_groups_is_refused_where_there_is_none(key: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{key} needs a consumer group"):
        parse_config("forward", {**FORWARD, key: 2})


def test_every_error_class_is_raised_somewhere() -> None:
    assert error_classes() - raised() == ROOTS
