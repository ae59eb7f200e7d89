"""PgBouncer in front of a PostgreSQL server, where the machine has it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psycopg

from tests.servers.finding import LOOPBACK, free_port, leave_out
from tests.servers.postgres import Database, PostgresServer, unprivileged_user

START_TIMEOUT_S = 30.0


@contextlib.contextmanager
def pgbouncer(
    server: PostgresServer, pool_mode: Literal["session", "transaction"], *users: str
) -> Iterator[int]:
    """The port of a PgBouncer with its own defaults; these users log in without a password."""
    found = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        leave_out("pgbouncer is not installed (apt-get install pgbouncer)")
    directory = Path(tempfile.mkdtemp(prefix="pgt-bouncer-"))
    port, behind = free_port(), urlsplit(server.dsn).port
    (directory / "users").write_text("".join(f'"{user}" ""\n' for user in ("postgres", *users)))
    configuration = directory / "pgbouncer.ini"
    configuration.write_text(
        f"[databases]\n* = host={LOOPBACK} port={behind}\n[pgbouncer]\n"
        f"listen_addr = {LOOPBACK}\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = trust\nauth_file = {directory / 'users'}\npool_mode = {pool_mode}\n"
    )
    user = unprivileged_user()
    if user is not None:
        for path in (directory, *directory.iterdir()):
            os.chown(path, user.pw_uid, user.pw_gid)
    process = subprocess.Popen(
        [found, configuration],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=directory,
        user=None if user is None else user.pw_uid,
        group=None if user is None else user.pw_gid,
        extra_groups=None if user is None else [],
        start_new_session=True,
    )
    try:
        _wait_until_accepting(port, process)
        yield port
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def through(port: int, database: Database, user: str = "postgres") -> str:
    """The URL of a database behind that port."""
    return f"postgresql://{user}@{LOOPBACK}:{port}/{database.name}"


def _wait_until_accepting(port: int, process: subprocess.Popen[bytes]) -> None:
    ends_at = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            psycopg.connect(f"postgresql://postgres@{LOOPBACK}:{port}/postgres").close()
        except psycopg.OperationalError:
            assert process.poll() is None, "PgBouncer ended"
            assert time.monotonic() < ends_at, "PgBouncer does not accept connections"
            time.sleep(0.05)
        else:
            return
