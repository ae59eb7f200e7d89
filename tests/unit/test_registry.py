"""Types by name: what exists is built, what does not is named, and nothing is loaded in vain."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from relay import registry
from relay.errors import ConfigurationError, DriverMissing
from relay.registry import (
    EXTRAS,
    SINKS,
    SOURCES,
    build_sink,
    build_source,
    missing_extras,
    source_runs_everywhere,
)
from tests.contract.surroundings import backend_context


@pytest.fixture
def without_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A sink whose module needs one that is not installed."""
    (tmp_path / "needs_a_driver.py").write_text("import no_such_driver\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "SINKS", {**SINKS, "nats": "needs_a_driver:Sink"})
    yield
    sys.modules.pop("needs_a_driver", None)


def test_an_extra_is_missing_when_one_of_its_distributions_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = metadata.version

    def without_two(name: str) -> str:
        if name in ("cramjam", "redis", "common-expression-language", "pytest"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    assert missing_extras() == []
    monkeypatch.setattr(metadata, "version", without_two)
    assert missing_extras() == ["filter", "kafka", "redis"]


@pytest.mark.parametrize("target", sorted({*SINKS.values(), *SOURCES.values()}))
def test_every_entry_leads_to_a_class_that_builds_itself(target: str) -> None:
    module, _, name = target.partition(":")

    assert callable(getattr(__import__(module, fromlist=[name]), name).from_options)


def test_a_type_that_is_none_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"'nast' is not a type of sink .*nats"):
        build_sink("nast", {}, backend_context())
    with pytest.raises(ConfigurationError, match=r"known are outbox, nats, kafka, redis, "):
        build_source("zzz", {}, backend_context())


@pytest.mark.shows("error:DriverMissing")
@pytest.mark.usefixtures("without_driver")
def test_a_missing_driver_is_one_line_that_names_the_extra() -> None:
    with pytest.raises(DriverMissing) as missing:
        build_sink("nats", {}, backend_context())

    assert str(missing.value) == (
        "the nats sink needs the Python module no_such_driver (pip install 'pgtrickle-relay[nats]')"
    )


def test_only_sources_to_which_others_come_run_in_every_relay() -> None:
    assert [type_ for type_ in SOURCES if source_runs_everywhere(type_)] == ["webhook"]


def test_every_extra_is_of_a_type_that_exists() -> None:
    assert EXTRAS.keys() <= {*SINKS, *SOURCES}


def test_the_file_backend_loads_no_driver_of_another() -> None:
    code = (
        "import sys, relay.registry as r\n"
        "r._resolve(r.SINKS, 'sink', 'file')\n"
        "r._resolve(r.SOURCES, 'source', 'file')\n"
        "assert not r.source_runs_everywhere('file')\n"
        "print([name for name in ('nats', 'httpx', 'aiohttp') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
