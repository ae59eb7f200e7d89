"""The command line starts quickly: it loads Hydra and little else."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

from tests.servers.process import REPOSITORY

DRIVERS = (
    "aio_pika",
    "aioboto3",
    "aiobotocore",
    "aiohttp",
    "aiokafka",
    "aiormq",
    "asyncpg",
    "boto3",
    "botocore",
    "httpx",
    "nats",
    "nkeys",
    "prometheus_client",
    "redis",
    "rich",
)

ROUNDS = 7
MOST_TIMES_HYDRA = 2.0

# What composing settings takes, whoever does it.
HYDRA = "from hydra import compose, initialize_config_dir"
COMMAND_LINE = "import relay.cli"


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return done.stdout


def _cpu_s(code: str) -> float:
    """Processor time of a Python that runs this: other work on the machine hardly counts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _run(code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_command_line_loads_no_driver() -> None:
    loaded = _run(f"{COMMAND_LINE}; import sys; print(*sys.modules)").split()

    assert "hydra" in loaded
    assert set(loaded) & set(DRIVERS) == set()


def test_help_and_settings_are_shown_without_a_driver() -> None:
    for arguments in (["--cfg", "job"], ["migrate", "--print"]):
        loaded = _run(
            "import sys; from relay.cli import run\n"
            "stdout, sys.stdout = sys.stdout, open('/dev/null', 'w')\n"
            f"assert run({arguments!r}) == 0\n"
            "print(*sys.modules, file=stdout)"
        ).split()

        # The migrations are read by the module that also applies them.
        assert set(loaded) & set(DRIVERS) <= ({"asyncpg"} if "migrate" in arguments else set())


def test_importing_the_command_line_takes_at_most_twice_what_hydra_takes() -> None:
    for code in (HYDRA, COMMAND_LINE):
        _run(code)  # what is compiled is compiled
    pairs = [(_cpu_s(HYDRA), _cpu_s(COMMAND_LINE)) for _ in range(ROUNDS)]

    hydra_s, command_line_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    assert command_line_s <= MOST_TIMES_HYDRA * hydra_s, pairs
