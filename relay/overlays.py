"""From YAML overlays, the environment and the command line to settings; the only user of Hydra.

It composes the settings, types them at once, and hands over. Nothing is instantiated from
configuration, no directory is made or changed, and logging is ours. Whatever is wrong in what a
person wrote is a `ConfigurationError` of one line, which quotes keys and places and no value: a
value may be a secret.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from relay.errors import ConfigurationError, suggestion
from relay.options import known_keys, parse_options
from relay.secrets import masked
from relay.settings import Settings, checked

Composed = Mapping[str, object]


class Variable(NamedTuple):
    """A setting with a flag and an environment variable of its own."""

    flag: str
    variable: str
    key: str
    meaning: str


VARIABLES = (
    Variable(
        "--postgres-url",
        "PGTRICKLE_RELAY_POSTGRES_URL",
        "postgres.url",
        "the database to work on",
    ),
    Variable(
        "--metrics-addr", "PGTRICKLE_RELAY_METRICS_ADDR", "metrics.addr", "host:port of metrics"
    ),
    Variable("--log-format", "PGTRICKLE_RELAY_LOG_FORMAT", "log.format", "text or json"),
    Variable(
        "--log-level", "PGTRICKLE_RELAY_LOG_LEVEL", "log.level", "debug, info, warning, error"
    ),
    Variable(
        "--relay-group-id", "PGTRICKLE_RELAY_GROUP_ID", "relay.group_id", "the group to share with"
    ),
)

_KEY = re.compile(r"[\w$/@-]+(\.[\w$-]+)*", re.ASCII)
_UNKNOWN_KEY = re.compile(r"Could not override '([^']+)'")
_UNKNOWN_OPTION = re.compile(
    r"Could not find '([^'/]+)/([^']*)'\s+Available options in '[^']+':((?:\n\t\S+)*)"
)
_UNSET = re.compile(r"Environment variable '([^']+)' not found")
_ITS_OWN_SECRETS = re.compile(r"(alias|anchor|tag|handle) ['\"!].*", re.DOTALL)
_NOT_FOR_PEOPLE = re.compile(r"\s*(object_type=.*|full_key:.*|Config search path:.*)")


def compose_settings(
    overrides: Sequence[str],
    *,
    config_dirs: Sequence[str] = (),
    flags: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    base_overrides: Sequence[str] = (),
) -> Composed:
    """Compose the settings; flags and environment are laid over what Hydra composed.

    ``flags`` maps keys to values, since a connection string is not valid override grammar. Raises
    `ConfigurationError` in the user's words.
    """
    directories = [_readable(directory) for directory in config_dirs]
    stated = _parsed(overrides)
    _OperatorOverlays.directories = [str(directory) for directory in directories]
    Plugins.instance().register(_OperatorOverlays)
    OmegaConf.register_new_resolver("env", lambda name: f"${{env:{name}}}", replace=True)
    OmegaConf.register_new_resolver("file", lambda path: f"${{file:{path}}}", replace=True)
    GlobalHydra.instance().clear()
    packaged = packaged_directory("conf")
    with _in_words([*directories, packaged], stated):
        with initialize_config_dir(str(packaged), version_base="1.3"):
            composed = compose("config", overrides=[*base_overrides, *overrides])
        plain = OmegaConf.to_container(composed, resolve=True)
    settings = {str(name): value for name, value in dict(plain).items()}  # type: ignore[arg-type]  # a mapping, since config.yaml is one
    _refuse_overlays_without_effect(settings, [*directories, packaged], stated)
    for _, variable, key, _ in VARIABLES:
        value = (flags or {}).get(key)
        if value is None and key not in {override.key_or_group for override in stated}:
            value = (environment or {}).get(variable)
        if value is not None:
            section, _, name = key.partition(".")
            inner = settings.get(section)
            settings[section] = {**(inner if isinstance(inner, dict) else {}), name: value}
    return settings


def type_settings(composed: Composed) -> Settings:
    """The typed settings. Raises `ConfigurationError` with path and suggestion."""
    metrics = composed.get("metrics")
    if isinstance(metrics, dict) and isinstance(metrics.get("addr"), int):
        # A port alone, which YAML takes for a number: `checked` says how to write it.
        composed = {**composed, "metrics": {**metrics, "addr": str(metrics["addr"])}}
    return checked(parse_options(composed, Settings, path=""))


def show_settings(composed: Composed) -> str:
    """The composed settings as YAML, secrets masked; wrong keys are shown as they are."""
    return yaml.safe_dump(masked(dict(composed)), sort_keys=False, allow_unicode=True)


def packaged_directory(name: str) -> Path:
    """A directory that travels inside the wheel and stands beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    inside = here / name
    return inside if inside.is_dir() else here.parent / name


class _OperatorOverlays(SearchPathPlugin):
    """Puts the operator's own directories in front of the packaged ones."""

    directories: Sequence[str] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for directory in reversed(self.directories):
            search_path.prepend("--config-dir", f"file://{directory}")


def _readable(directory: str) -> Path:
    path = Path(directory)
    try:
        if not directory or not path.is_dir():
            raise ConfigurationError(f"--config-dir {directory} is not a directory")
        with os.scandir(path):
            return path.resolve()
    except OSError as error:
        raise ConfigurationError(f"--config-dir {directory}: {error.strerror}") from None


def _parsed(overrides: Sequence[str]) -> list[Override]:
    parsed: list[Override] = []
    for text in overrides:
        key = text.partition("=")[0].lstrip("+~")
        if not key:
            raise ConfigurationError("a setting begins with =", remedy="write key=value")
        if not _KEY.fullmatch(key):
            raise ConfigurationError(
                f"{key!r} is no key", remedy="keys are names with dots between: relay.group_id=blue"
            )
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            raise ConfigurationError(
                f"the value of {key} can't be read",
                remedy=_quoting(key),
            ) from None
        if override.is_sweep_override():
            raise ConfigurationError(f"{key} has several values", remedy=_quoting(key))
        if key.partition(".")[0].partition("/")[0] == "hydra":
            raise ConfigurationError(f"{key}: settings of Hydra itself have no effect here")
        parsed.append(override)
    return parsed


def _quoting(key: str) -> str:
    flags = [flag for flag, _, of, _ in VARIABLES if of == key]
    return f"quote the value: '{key}=\"…\"'" + "".join(f", or use {flag}" for flag in flags)


def _refuse_overlays_without_effect(
    settings: Composed, directories: Sequence[Path], stated: Sequence[Override]
) -> None:
    """An overlay's keys land under its group's name unless its first line says otherwise."""
    known = set(known_keys(Settings)) | {key.partition(".")[0] for key in known_keys(Settings)}
    for override in stated:
        group = override.key_or_group
        if group in known or group not in settings:
            continue
        for file in _files_of(override, directories):
            if file.read_bytes().startswith(codecs.BOM_UTF8):
                raise ConfigurationError(
                    f"{file} has no effect: its first line begins with a byte order mark",
                    remedy="save it as UTF-8 without one",
                )
            raise ConfigurationError(
                f"{file} has no effect: its keys are read as {group}.…",
                remedy="make its first line: # @package _global_",
            )


def _files_of(override: Override, directories: Sequence[Path]) -> Iterator[Path]:
    names = override.value()
    for name in names if isinstance(names, list) else [names]:
        for directory in directories:
            file = directory / override.key_or_group / f"{name}.yaml"
            if file.is_file():
                yield file
                break


@contextmanager
def _in_words(directories: Sequence[Path], stated: Sequence[Override]) -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise into one line of ours."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark else "YAML"
        # What it calls an alias or a tag may be a password without quotes.
        problem = _ITS_OWN_SECRETS.sub(r"\1", error.problem or "can't be read")
        raise ConfigurationError(
            f"{where}: {problem}", remedy="correct the YAML; put special characters in quotes"
        ) from None
    except yaml.reader.ReaderError as error:
        raise ConfigurationError(f"{error.name}: {error.reason}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(
            f"{_not_utf8(directories)} is not UTF-8", remedy="save it as UTF-8"
        ) from None
    except OmegaConfBaseException as error:
        raise _of_interpolation(error) from None
    except (HydraException, ValueError) as error:
        raise _of_hydra(error, directories, stated) from None
    except OSError as error:
        raise ConfigurationError(f"{error.filename}: {error.strerror}") from None
    except RecursionError:
        raise ConfigurationError("an overlay is nested too deeply") from None


def _not_utf8(directories: Sequence[Path]) -> str:
    for directory in directories:
        for file in sorted(directory.rglob("*.y*ml")):
            try:
                file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                return str(file)
            except OSError:
                continue
    return "an overlay"


def _of_interpolation(error: OmegaConfBaseException) -> ConfigurationError:
    key = error.full_key or "a value"
    name = type(error).__name__
    if name == "InterpolationKeyError":
        problem = f"{key} refers to a key that is not there"
    elif name == "UnsupportedInterpolationType":
        problem = f"{key} has a reference of an unknown kind"
    elif unset := _UNSET.search(str(error)):
        problem = f"{key} refers to the variable {unset[1]}, which is not set"
    else:
        problem = f"{key} can't be read"
    return ConfigurationError(
        problem, remedy="references are ${env:NAME}, ${file:/path} and ${key.of.the.settings}"
    )


def _of_hydra(
    error: Exception, directories: Sequence[Path], stated: Sequence[Override]
) -> ConfigurationError:
    text = str(error)
    unknown = _UNKNOWN_KEY.search(text)
    if unknown:
        return _of_unknown_key(unknown[1], directories, stated)
    missing = _UNKNOWN_OPTION.search(text)
    if missing:
        options = [line.strip() for line in missing[3].splitlines() if line.strip()]
        return ConfigurationError(
            f"{missing[1]}={missing[2]}: there is no such overlay",
            remedy=suggestion(missing[2], options),
        )
    lines = [line.strip() for line in text.split("\nSee https://", 1)[0].splitlines()]
    first = next((line for line in lines if line and not _NOT_FOR_PEOPLE.match(line)), "")
    if "raised while composing config" in first:
        where = first.partition(":")[0].removeprefix("In ")
        return ConfigurationError(
            f"{where} does not fit: it is a list or a text where keys are expected, or the reverse"
        )
    if isinstance(error.__cause__, OmegaConfBaseException) and (
        not first or "merging override" in first
    ):
        return _of_interpolation(error.__cause__)
    for override in stated:
        if override.input_line:
            first = first.replace(override.input_line, override.key_or_group)
    groups = [override.key_or_group for override in stated]
    group = first.removeprefix("Multiple values for ").partition(".")[0]
    if groups.count(group) > 1:
        return ConfigurationError(
            f"{group} is chosen twice", remedy=f"write +{group}=[first,second], the later one wins"
        )
    if first.startswith("force-add of config groups"):
        return ConfigurationError("++ does not go with an overlay", remedy="write a single +")
    if "override a value use 'override" in first:
        return ConfigurationError(first.partition(".")[0], remedy="leave out the +")
    if first.startswith("Could not append to config"):
        return ConfigurationError(first.partition(". ")[2], remedy="leave out the +")
    return ConfigurationError(first or "the settings can't be composed")


def _of_unknown_key(
    key: str, directories: Iterable[Path], stated: Sequence[Override]
) -> ConfigurationError:
    if any((directory / key).is_dir() for directory in directories):
        chosen = next((one.value() for one in stated if one.key_or_group == key), "…")
        return ConfigurationError(
            f"{key} is not a key but a group of overlays", remedy=f"did you mean +{key}={chosen}?"
        )
    if key.partition(".")[0] == "backends":
        return ConfigurationError(
            "a profile is added, not overridden", remedy="write +backends.<name>={type: …}"
        )
    remedy = suggestion(key, known_keys(Settings), otherwise="see pgtrickle-relay --cfg job")
    return ConfigurationError(f"{key} is not a known key", remedy=remedy)
