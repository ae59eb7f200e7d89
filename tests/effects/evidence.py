"""What must have an effect that a test shows, and which tests say that they show it.

A test says so with a marker, `@pytest.mark.shows("setting:relay.batch_size")`. Markers are read
from the source text, so that the answer is the same whichever tests run.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from relay import errors
from relay.metrics import METRICS
from relay.options import known_keys
from relay.pipeline_config import PipelineConfig
from relay.registry import SINKS, SOURCES
from relay.settings import Settings

TESTS = Path(__file__).parents[1]
RELAY = Path(errors.__file__).parent


def everything() -> set[str]:
    """All that must have an effect, each with its kind in front."""
    return {
        *(f"setting:{path}" for path in known_keys(Settings)),
        *(f"pipeline:{key}" for key in known_keys(PipelineConfig)),
        *_backend_keys("sink", SINKS),
        *_backend_keys("source", SOURCES),
        *(f"metric:{spec.name}" for spec in METRICS),
        *(f"error:{name}" for name in error_classes()),
    }


def error_classes() -> set[str]:
    """Every exception class of the relay's error module."""
    return {
        name
        for name, member in vars(errors).items()
        if inspect.isclass(member) and issubclass(member, Exception)
    }


def shown() -> dict[str, list[str]]:
    """What the tests say that they show: name to the tests, as ``file::test``."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for test, name in _markers(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault(name, []).append(f"{path.relative_to(TESTS)}::{test}")
    return found


def raised() -> set[str]:
    """The names that the relay's code raises: in a raise statement, by a call, or from a table."""
    names: set[str] = set()
    for path in RELAY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Raise(exc=ast.Name(id=name)) | ast.Call(func=ast.Name(id=name)):
                    names.add(name)
                case ast.Dict(values=values):
                    names.update(value.id for value in values if isinstance(value, ast.Name))
                case _:
                    pass
    return names


def _backend_keys(role: str, table: Mapping[str, str]) -> set[str]:
    """``role:type.key`` for every key; types that share a class go by the last one's name."""
    last_type = {target: type_ for type_, target in table.items()}
    return {
        f"{role}:{type_}.{key}"
        for target, type_ in last_type.items()
        for key in known_keys(_options_of(role, target.partition(":")[0]))
    }


def _options_of(role: str, package: str) -> type[msgspec.Struct]:
    """The struct of a backend's keys: the one whose name ends in SinkOptions or SourceOptions."""
    ending = f"{role.capitalize()}Options"
    found = {
        member
        for path in (RELAY / "backends" / package.rpartition(".")[2]).glob("*.py")
        for name, member in vars(importlib.import_module(f"{package}.{path.stem}")).items()
        if name.endswith(ending) and inspect.isclass(member) and issubclass(member, msgspec.Struct)
    }
    assert len(found) == 1, f"{package} has {len(found)} structs named …{ending}"
    return found.pop()


def _markers(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Each test that has the marker, and each name in it."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            if (
                isinstance(decorator, ast.Call)
                and ast.unparse(decorator.func) == "pytest.mark.shows"
            ):
                for argument in decorator.args:
                    assert isinstance(argument, ast.Constant), "a marker names its things literally"
                    yield node.name, str(argument.value)
