"""The command line, and the only module that knows Hydra.

It composes the settings from YAML overlays, types them at once, and hands over. Nothing is
instantiated from configuration, no directory is made or changed, and logging is ours.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from relay import __version__
from relay.errors import CatalogError, ConfigurationError, Outage, RelayError
from relay.options import known_keys, parse_options
from relay.secrets import masked
from relay.settings import Settings, checked

EXIT_OK, EXIT_RUNTIME, EXIT_CONFIGURATION, EXIT_UNREACHABLE = 0, 1, 2, 3

# flag, environment variable, key it sets, help
_CLASSIC = (
    ("--postgres-url", "PGTRICKLE_RELAY_POSTGRES_URL", "postgres.url", "the database to work on"),
    ("--metrics-addr", "PGTRICKLE_RELAY_METRICS_ADDR", "metrics.addr", "host:port of metrics"),
    ("--log-format", "PGTRICKLE_RELAY_LOG_FORMAT", "log.format", "text or json"),
    ("--log-level", "PGTRICKLE_RELAY_LOG_LEVEL", "log.level", "debug, info, warning, error"),
    ("--relay-group-id", "PGTRICKLE_RELAY_GROUP_ID", "relay.group_id", "the group to share with"),
)

_VERBS: Mapping[str, str] = {
    "run": "run the pipelines of the catalog until stopped (the default)",
    "drain": "run until everything is delivered, then exit",
    "migrate": "install or upgrade the catalog in the database",
    "demo": "show it all on an embedded PostgreSQL and NATS",
}

_UNKNOWN_KEY = re.compile(r"Could not override '([^']+)'")
_UNKNOWN_OPTION = re.compile(
    r"Could not find '([^'/]+)/([^']+)'\s+Available options in '[^']+':((?:\n\t\S+)*)"
)

_EXAMPLES = """\
settings are Hydra overrides and follow the verb:
  pgtrickle-relay +env=prod                      an overlay
  pgtrickle-relay relay.group_id=blue log=json   single keys, a group's option
  pgtrickle-relay --config-dir /etc/relay +env=mine
  pgtrickle-relay --cfg job +env=prod            print the result, secrets masked

precedence: command line > environment > overlay > default
environment: PGTRICKLE_RELAY_POSTGRES_URL, _METRICS_ADDR, _LOG_FORMAT, _LOG_LEVEL, _GROUP_ID
exit codes: 0 ok, 1 runtime, 2 configuration, 3 environment unreachable
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run the command line; the exit code. Every failure is one line on standard error."""
    try:
        return _run(argv)
    except ConfigurationError as error:
        return _refuse(error, EXIT_CONFIGURATION)
    except (CatalogError, Outage) as error:
        return _refuse(error, EXIT_UNREACHABLE)
    except RelayError as error:
        return _refuse(error, EXIT_RUNTIME)
    except KeyboardInterrupt:
        return 130


def _run(argv: Sequence[str]) -> int:
    verb, rest = _split_verb(argv)
    arguments = _parser(verb).parse_intermixed_args(rest)
    if verb == "migrate" and arguments.print:
        from relay.migrate import migration_script

        composed = _composed(verb, arguments)
        sys.stdout.write(migration_script(type_settings(composed).postgres.schema))
        return EXIT_OK
    composed = _composed(verb, arguments)
    if arguments.cfg:
        sys.stdout.write(show_settings(composed))
        return EXIT_OK
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_command(verb, arguments, type_settings(composed)))


def _composed(verb: str, arguments: argparse.Namespace) -> DictConfig:
    return compose_settings(
        arguments.overrides,
        config_dirs=arguments.config_dir,
        flags=_flags(arguments),
        environment=os.environ,
        base_overrides=["+env=demo"] if verb == "demo" else (),
    )


def compose_settings(
    overrides: Sequence[str],
    *,
    config_dirs: Sequence[str] = (),
    flags: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    base_overrides: Sequence[str] = (),
) -> DictConfig:
    """Compose the settings; flags and environment are laid over what Hydra composed.

    ``flags`` maps keys to values, since a connection string is not valid override grammar. Raises
    `ConfigurationError` in the user's words.
    """
    for directory in config_dirs:
        if not Path(directory).is_dir():
            raise ConfigurationError(f"--config-dir {directory} is not a directory")
    _OperatorOverlays.directories = [str(Path(directory).resolve()) for directory in config_dirs]
    Plugins.instance().register(_OperatorOverlays)
    OmegaConf.register_new_resolver("env", lambda name: f"${{env:{name}}}", replace=True)
    OmegaConf.register_new_resolver("file", lambda path: f"${{file:{path}}}", replace=True)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(_packaged("conf")), version_base="1.3"):
            composed = compose("config", overrides=[*base_overrides, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise _in_words(error) from None
    stated = _keys_of(overrides)
    for _, variable, key, _ in _CLASSIC:
        value = (flags or {}).get(key)
        if value is None and key not in stated:
            value = (environment or {}).get(variable)
        if value is not None:
            OmegaConf.update(composed, key, value)
    return composed


def type_settings(composed: DictConfig) -> Settings:
    """The typed settings. Raises `ConfigurationError` with path and suggestion."""
    return checked(parse_options(_plain(composed), Settings, path=""))


def show_settings(composed: DictConfig) -> str:
    """The composed settings as YAML, secrets masked; wrong keys are shown as they are."""
    return yaml.safe_dump(masked(_plain(composed)), sort_keys=False, allow_unicode=True)


class _OperatorOverlays(SearchPathPlugin):
    """Puts the operator's own directories in front of the packaged ones."""

    directories: Sequence[str] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for directory in reversed(self.directories):
            search_path.prepend("--config-dir", f"file://{directory}")


class _Parser(argparse.ArgumentParser):
    """Argument errors go the way of all errors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(message, remedy="see pgtrickle-relay --help")


def _split_verb(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The verb stands first; without one it is ``run``."""
    if not argv or argv[0].startswith("-") or "=" in argv[0]:
        return "run", list(argv)
    if argv[0] in _VERBS:
        return argv[0], list(argv[1:])
    near = get_close_matches(argv[0], _VERBS, n=1)
    raise ConfigurationError(
        f"{argv[0]!r} is not a command",
        remedy=f"did you mean {near[0]}?" if near else f"known are {', '.join(_VERBS)}",
    )


def _parser(verb: str) -> _Parser:
    commands = "\n".join(f"  {name:<9} {text}" for name, text in _VERBS.items())
    parser = _Parser(
        prog="pgtrickle-relay",
        usage="pgtrickle-relay [command] [flags] [key=value | +group=option ...]",
        description="Moves events between PostgreSQL and messaging systems, without losing one.\n"
        f"\ncommands:\n{commands}",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pgtrickle-relay {__version__}")
    parser.add_argument("--cfg", choices=("job",), help="print the composed settings and exit")
    parser.add_argument(
        "--config-dir", action="append", default=[], metavar="DIR", help="your own overlays"
    )
    for flag, _, key, text in _CLASSIC:
        parser.add_argument(flag, dest=key, metavar=flag.rpartition("-")[2].upper(), help=text)
    if verb == "migrate":
        parser.add_argument("--print", action="store_true", help="print the SQL, change nothing")
        parser.add_argument("--uninstall", action="store_true", help="remove the catalog")
        parser.add_argument("--yes", action="store_true", help="remove it without asking")
    if verb == "demo":
        parser.add_argument("--seconds", type=float, default=None, help="end after so long")
        parser.add_argument("--rate", type=float, default=50.0, help="orders written per second")
        parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
    return parser


def _flags(arguments: argparse.Namespace) -> dict[str, str]:
    values = vars(arguments)
    return {key: values[key] for _, _, key, _ in _CLASSIC if values[key] is not None}


async def _command(verb: str, arguments: argparse.Namespace, settings: Settings) -> int:
    if verb == "migrate":
        from relay.app import run_migrate, run_uninstall

        if arguments.uninstall:
            return await run_uninstall(
                settings, confirm=lambda text: arguments.yes or _confirmed(text), say=_say
            )
        return await run_migrate(settings, say=_say)
    if verb == "demo":
        from relay.demo import run_demo

        return await run_demo(
            settings, seconds=arguments.seconds, rate=arguments.rate, as_json=arguments.json
        )
    from relay.app import run_relay

    return await run_relay(settings, until_drained=verb == "drain")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def _packaged(name: str) -> Path:
    """A directory that travels inside the wheel and stands beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    inside = here / name
    return inside if inside.is_dir() else here.parent / name


def _keys_of(overrides: Sequence[str]) -> set[str]:
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {override.key_or_group for override in parsed}


def _plain(composed: DictConfig) -> dict[str, object]:
    try:
        plain = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise _in_words(error) from None
    if not isinstance(plain, dict):
        raise ConfigurationError("the settings are not a mapping")
    return {str(name): value for name, value in plain.items() if name != "env"}


def _in_words(error: Exception) -> ConfigurationError:
    """Hydra's complaint in one line of ours, without its search path and links."""
    text = str(error)
    unknown = _UNKNOWN_KEY.match(text)
    if unknown:
        near = get_close_matches(unknown[1], known_keys(Settings), n=1)
        return ConfigurationError(
            f"{unknown[1]} is not a known key",
            remedy=f"did you mean {near[0]}?" if near else "see pgtrickle-relay --cfg job",
        )
    missing = _UNKNOWN_OPTION.search(text)
    if missing:
        options = [line.strip() for line in missing[3].splitlines() if line.strip()]
        near = get_close_matches(missing[2], options, n=1)
        return ConfigurationError(
            f"{missing[1]}={missing[2]}: there is no such overlay",
            remedy=f"did you mean {near[0]}?" if near else f"known are {', '.join(options)}",
        )
    first = [line.strip() for line in text.split("\nSee https://", 1)[0].splitlines()]
    return ConfigurationError("; ".join(line for line in first if line))


def _refuse(error: RelayError, code: int) -> int:
    sys.stderr.write(f"pgtrickle-relay: {error}\n")
    return code


def _confirmed(question: str) -> bool:
    """Asks on the terminal; without one nothing is confirmed."""
    if not sys.stdin.isatty():
        raise ConfigurationError(
            "--uninstall asks before it removes anything, and there is no terminal",
            remedy="say --yes",
        )
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
