"""What every command does before it can look at the catalog; each of it stands here once."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager

import msgspec

from relay import __version__
from relay.catalog import Catalog, Reader
from relay.errors import AuthenticationRefused, CatalogMissing, NotConnected
from relay.postgres import Database
from relay.secrets import OPERATOR, SecretPolicy, Secrets
from relay.settings import PostgresSettings, Settings

# Any of them says where libpq's programs would connect.
_LIBPQ_ADDRESSES = ("PGHOST", "PGHOSTADDR", "PGSERVICE")


def operator_secrets(environment: Mapping[str, str]) -> Secrets:
    """What the settings themselves may refer to."""
    return Secrets(OPERATOR, environment)


def catalog_secrets(settings: Settings, environment: Mapping[str, str]) -> Secrets:
    """What pipelines may refer to."""
    policy = SecretPolicy(
        file_roots=settings.secrets.file_roots, env_allow=settings.secrets.env_allow
    )
    return Secrets(policy, environment)


def resolved(settings: PostgresSettings, secrets: Secrets) -> PostgresSettings:
    """The same settings with secret references resolved. Raises `SecretUnresolved`."""
    return msgspec.convert(secrets.resolve(msgspec.to_builtins(settings)), PostgresSettings)


@asynccontextmanager
async def opened(database: Database, catalog: Catalog) -> AsyncIterator[None]:
    """Open the database, and make sure that its catalog is there, ours to use, and not older.

    Raises `ConfigurationError`, `CatalogMissing`, `Outage`, each with what to do.
    """
    with naming_the_variable(database.settings):
        await database.open()
    try:
        await _require_catalog(database, catalog)
        yield
    finally:
        await database.aclose()


@asynccontextmanager
async def opened_catalog(
    settings: Settings, environment: Mapping[str, str]
) -> AsyncIterator[Catalog]:
    """The catalog of these settings, for as long as the block lasts. Raises as `opened`."""
    database = Database(resolved(settings.postgres, operator_secrets(environment)))
    catalog = Catalog(database, settings.relay.group_id)
    async with opened(database, catalog):
        yield catalog


@contextmanager
def naming_the_variable(settings: PostgresSettings) -> Iterator[None]:
    """Where nothing answers, and nobody said where, say where it was tried and how to say it."""
    try:
        yield
    except NotConnected as error:
        if settings.url or any(os.environ.get(name) for name in _LIBPQ_ADDRESSES):
            raise
        raise NotConnected(
            f"no database is named, and localhost:{os.environ.get('PGPORT', '5432')} and the local"
            f" sockets do not answer: {error.problem.rpartition(': ')[2]}",
            remedy="set PGTRICKLE_RELAY_POSTGRES_URL, or --postgres-url",
        ) from error


def other_groups(readers: Sequence[Reader], group_id: str) -> list[str]:
    """The relay groups that have positions, where this one has none: it would begin again."""
    groups = {reader.relay_group_id for reader in readers if reader.relay_group_id is not None}
    return [] if group_id in groups else sorted(groups)


async def _require_catalog(database: Database, catalog: Catalog) -> None:
    try:
        version = await catalog.version()
    except AuthenticationRefused as error:
        role = await database.fetch_row(
            "asking who we are", "select pg_catalog.quote_ident(current_user) as name"
        )
        name = "this role" if role is None else role["name"]
        raise AuthenticationRefused(
            f"{name} may not use the relay's catalog: {error.problem}",
            remedy=f"grant pgtrickle_relay to {name}",
        ) from error
    if _numbers(version) < _numbers(__version__):
        raise CatalogMissing(
            f"the catalog is of version {version}, this relay of {__version__}",
            remedy="run `pgtrickle-relay migrate`",
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
