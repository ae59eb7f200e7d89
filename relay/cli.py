"""The command line: what an operator types, and in which words it is refused.

Flags, settings and the verb may stand in any order. Every failure is one line on standard error,
without a secret.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn, TypeVar

import msgspec

from relay import __version__
from relay.errors import CatalogError, ConfigurationError, Outage, RelayError, suggestion
from relay.options import known_keys
from relay.overlays import VARIABLES, Composed, compose_settings, show_settings, type_settings
from relay.secrets import mask_urls
from relay.settings import Settings

T = TypeVar("T")

EXIT_OK, EXIT_RUNTIME, EXIT_CONFIGURATION, EXIT_UNREACHABLE = 0, 1, 2, 3

_VERBS: Mapping[str, str] = {
    "run": "run the pipelines of the catalog until stopped (the default)",
    "status": "show the fleet, from the database alone, or one relay",
    "doctor": "look at everything that can be wrong, and say how to mend it",
    "validate": "look at settings, overlays and pipelines, or at one, without a destination",
    "drain": "run until everything is delivered, then exit",
    "migrate": "install or upgrade the catalog in the database",
    "demo": "show it all on an embedded PostgreSQL and NATS",
}


class _Flag(NamedTuple):
    """A flag that only some verbs know."""

    name: str
    verbs: Sequence[str]
    meaning: str
    metavar: str = ""
    type: Callable[[str], object] | None = None


def _above_zero(kind: Callable[[str], float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = 0
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(f"must be above 0, but is {text}")
        return number

    return read


_FLAGS = (
    _Flag("--print", ["migrate"], "print the SQL, change nothing"),
    _Flag("--uninstall", ["migrate"], "remove the catalog"),
    _Flag("--yes", ["migrate"], "remove it without asking"),
    _Flag("--seconds", ["demo"], "end after so long", "SECONDS", _above_zero(float)),
    _Flag("--rate", ["demo"], "orders written per second", "RATE", _above_zero(float)),
    _Flag("--timeout", ["drain"], "give up after so long", "SECONDS", _above_zero(float)),
    _Flag("--once", ["status"], "print a table and exit, as in a pipe"),
    _Flag("--relay", ["status"], "ask this relay alone, at its metrics.addr", "HOST:PORT", str),
    _Flag(
        "--sample",
        ["validate"],
        "show the next events as they would go out",
        "EVENTS",
        _above_zero(int),
    ),
    _Flag(
        "--json", ["status", "doctor", "validate", "drain", "demo"], "answer with one JSON object"
    ),
)

_EXAMPLES = """\
settings are Hydra overrides; flags, settings and the command stand in any order:
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal in another encoding shows something else instead of a mark.
            stream.reconfigure(errors="replace")
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
    except BrokenPipeError:
        # Who read our answer has enough; nothing more is to be written at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_RUNTIME


def _run(argv: Sequence[str]) -> int:
    arguments = parser().parse_intermixed_args(argv)
    verb, name, overrides = _told_apart(arguments.words)
    for flag in _FLAGS:
        if verb not in flag.verbs and getattr(arguments, flag.name.lstrip("-")):
            raise ConfigurationError(
                f"{flag.name} does not go with {verb}",
                remedy=f"it belongs to {', '.join(flag.verbs)}",
            )

    def compose() -> Composed:
        return compose_settings(
            overrides,
            config_dirs=arguments.config_dir,
            flags=_flags(arguments),
            environment=os.environ,
            base_overrides=["+env=demo"] if verb == "demo" else (),
        )

    if verb == "validate" and not arguments.cfg:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_validate(arguments, name, compose))
    composed = compose()
    if arguments.cfg:
        sys.stdout.write(show_settings(composed))
        return EXIT_OK
    settings = type_settings(composed)
    if verb == "migrate" and arguments.print:
        from relay.migrate import migration_script

        sys.stdout.write(migration_script(settings.postgres.schema))
        return EXIT_OK
    if verb == "doctor":
        arguments.origins = _origins(arguments, overrides, settings)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_command(verb, arguments, settings))


class _Parser(argparse.ArgumentParser):
    """Argument errors go the way of all errors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(message, remedy="see pgtrickle-relay --help")


def _told_apart(words: Sequence[str]) -> tuple[str, str | None, list[str]]:
    """The verb, ``run`` where none is named, the pipeline behind ``validate``, and overrides."""
    overrides = [word for word in words if "=" in word or word.startswith(("+", "~"))]
    plain = [word for word in words if word not in overrides]
    if not plain:
        return "run", None, overrides
    verb, *more = plain
    if verb in known_keys(Settings):
        raise ConfigurationError(f"{verb} has no value", remedy=f"write {verb}=…")
    if verb not in _VERBS:
        raise ConfigurationError(f"{verb!r} is not a command", remedy=suggestion(verb, _VERBS))
    name = more.pop(0) if more and verb == "validate" else None
    for word in more:
        if not word:
            raise ConfigurationError(
                "an empty argument", remedy="is it a variable in quotes that is not set?"
            )
        if word in known_keys(Settings):
            raise ConfigurationError(f"{word} has no value", remedy=f"write {word}=…")
        raise ConfigurationError(f"{word!r} is one word too many behind {verb}")
    return verb, name, overrides


def parser() -> _Parser:
    """All commands and flags; Hydra overrides are what is left."""
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
    for flag, _, key, meaning in VARIABLES:
        parser.add_argument(flag, dest=key, metavar=flag.rpartition("-")[2].upper(), help=meaning)
    for name, verbs, meaning, metavar, type_ in _FLAGS:
        help_ = f"{', '.join(verbs)}: {meaning}"
        if type_ is None:
            parser.add_argument(name, action="store_true", help=help_)
        else:
            parser.add_argument(name, type=type_, metavar=metavar, help=help_)
    parser.add_argument("words", nargs="*", metavar="key=value", help="Hydra overrides")
    return parser


def _flags(arguments: argparse.Namespace) -> dict[str, str]:
    values = vars(arguments)
    return {key: values[key] for _, _, key, _ in VARIABLES if values[key] is not None}


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
            settings,
            seconds=arguments.seconds,
            rate=50.0 if arguments.rate is None else arguments.rate,
            as_json=arguments.json,
        )
    if verb == "status":
        return await _status(arguments, settings)
    if verb == "doctor":
        return await _doctor(arguments, settings)
    if verb == "drain":
        return await _drain(arguments, settings)
    from relay.app import run_relay

    return await run_relay(settings)


def _origins(
    arguments: argparse.Namespace, overrides: Sequence[str], settings: Settings
) -> dict[str, str]:
    from relay.doctor import origins_of

    stated = {*_flags(arguments), *(word.lstrip("+~").partition("=")[0] for word in overrides)}
    variables = {one.key: one.variable for one in VARIABLES if one.variable in os.environ}
    return origins_of(
        settings,
        [word for word in overrides if "." not in word.partition("=")[0]],
        stated,
        {key: variable for key, variable in variables.items() if key not in stated},
    )


async def _status(arguments: argparse.Namespace, settings: Settings) -> int:
    if sys.stdout.isatty() and not (arguments.once or arguments.json):
        from relay.app import watch_fleet, watch_relay
        from relay.status import can_show

        if can_show():
            watching = (
                watch_relay(settings, arguments.relay) if arguments.relay else watch_fleet(settings)
            )
            return EXIT_OK if await watching else EXIT_RUNTIME
    from relay.overview import of_relay, overview, table_of

    if arguments.relay:
        from relay.remote import status_of

        seen = of_relay(await status_of(arguments.relay))
    else:
        from relay.catalog import readers_of
        from relay.start import opened_catalog

        async with opened_catalog(settings, os.environ) as catalog:
            seen = await overview(catalog, readers_of(await catalog.pipelines()))
    _answer(arguments, seen, table_of)
    return EXIT_OK if seen.is_well else EXIT_RUNTIME


async def _doctor(arguments: argparse.Namespace, settings: Settings) -> int:
    from relay.doctor import diagnose, lines_of

    diagnosis = await diagnose(settings, os.environ, arguments.origins)
    _answer(arguments, diagnosis, lines_of)
    return EXIT_OK if diagnosis.is_well else EXIT_RUNTIME


async def _validate(
    arguments: argparse.Namespace, name: str | None, compose: Callable[[], Composed]
) -> int:
    from relay.validate import Validation, lines_of, settings_of, validate

    settings, findings = settings_of(compose, arguments.config_dir)
    if settings is None:
        found = Validation(is_valid=False, findings=findings, pipelines=[], samples=[])
    else:
        found = await validate(settings, os.environ, name=name, samples=arguments.sample or 0)
    _answer(arguments, found, lines_of)
    return EXIT_OK if found.is_valid else EXIT_CONFIGURATION


async def _drain(arguments: argparse.Namespace, settings: Settings) -> int:
    """All that is for people goes to standard error: the sink may be standard output."""
    from relay.drain import lines_of, run_drain
    from relay.progress import Progress

    progress = Progress(is_wanted=not arguments.json)

    def show(delivered: int, left: int) -> None:
        progress.show(delivered, delivered + left, f"{delivered:,} delivered, {left:,} rows left")

    report = await run_drain(settings, timeout_s=arguments.timeout, show=show)
    progress.clear()
    if arguments.json:
        _say(msgspec.json.encode(report).decode())
    else:
        sys.stderr.writelines(f"{line}\n" for line in lines_of(report))
    return EXIT_OK if report.is_complete else EXIT_RUNTIME


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def _refuse(error: RelayError, code: int) -> int:
    sys.stderr.write(f"pgtrickle-relay: {mask_urls(' '.join(str(error).split()))}\n")
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


def _answer(
    arguments: argparse.Namespace, found: T, lines_of: Callable[[T], Iterable[str]]
) -> None:
    """As JSON or for people: names and texts of others may hold what a terminal would obey."""
    if arguments.json:
        _say(msgspec.json.encode(found).decode())
        return
    for line in lines_of(found):
        _say("".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in line))
