"""The image: what it holds, how large that is, and that both are found when they are wrong."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

from relay.assembly import _file_roots
from relay.registry import SINKS, SOURCES
from relay.settings import Settings
from scripts import bundle, image_size, lock, smoke
from tests.servers.process import REPOSITORY


@pytest.mark.slow
def test_the_layer_is_whole_and_the_image_small(capfd: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([REPOSITORY / "scripts" / "image-size"], check=False)

    said = capfd.readouterr()
    assert done.returncode == 0, f"{said.out}\n{said.err}"
    assert "below 50 MB" in said.out


def test_an_image_is_measured_by_platform_and_without_its_attestations(tmp_path: Path) -> None:
    image = tmp_path / "image.tar"
    small, large = 20_000_000, image_size.BOUND_BYTES + 1
    with tarfile.open(image, "w") as archive:

        def add(name: str, content: object) -> None:
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))

        def entry(digest: str, architecture: str) -> dict[str, object]:
            return {"digest": f"sha256:{digest}", "platform": {"architecture": architecture}}

        add("blobs/sha256/a", {"layers": [{"size": small}, {"size": 1}]})
        add("blobs/sha256/b", {"layers": [{"size": large}]})
        add("blobs/sha256/c", {"layers": [{"size": large}]})
        entries = [entry("a", "amd64"), entry("b", "arm64"), entry("c", "unknown")]
        add("blobs/sha256/d", {"manifests": entries})
        add("index.json", {"manifests": [{"digest": "sha256:d"}]})

    sizes = image_size.image_bytes(image)

    assert sizes == {"amd64": small + 1, "arm64": large}
    assert [image_size.report(*one) for one in sizes.items()] == [True, False]


def test_only_what_nobody_reads_is_left_out(tmp_path: Path) -> None:
    kept = [
        *("aiokafka/record/records.so", "relay/conf/config.yaml", "relay/sql/prologue.sql"),
        *("botocore/data/endpoints.json", "botocore/data/sqs/service-2.json"),
        *("pygments/lexer.py", "pygments/lexers/__init__.py", "pygments/lexers/_mapping.py"),
        *("botocore/data/sts/service-2.json", "certifi/cacert.pem", "x.dist-info/licenses/LICENSE"),
    ]
    left_out = [
        *(
            "bin/pgtrickle-relay",
            "botocore/data/ec2/service-2.json",
            "boto3/data/s3/resources.json",
        ),
        *("pydantic_core/core.so", "pygments/lexers/python.py"),
        *("uvloop/loop.c", "uvloop/loop.pyi", "certifi/tests/test_certifi.py"),
    ]
    for name in [*kept, *left_out]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    unread = {path.relative_to(tmp_path) for path in bundle.unread(tmp_path)}

    for name in map(Path, [*kept, *left_out]):
        is_left_out = bool(unread & {name, *name.parents})
        assert is_left_out is (str(name) in left_out), name


def test_the_locks_are_of_the_dependencies_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lock.stale() == []

    monkeypatch.setattr(lock, "BUILDERS", (*lock.BUILDERS, "another"))

    assert lock.stale() == ["locks/relay.txt", "locks/build.txt"]


def test_a_relay_starts_where_it_can_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)

    assert _file_roots(Settings()) == (Path.cwd(),)


def test_a_package_that_is_not_whole_is_found() -> None:
    with pytest.raises(smoke.NotWhole, match="--version should end with 0"):
        smoke.check(["false"], "1.2.3")


def test_every_backend_is_looked_for_in_a_package() -> None:
    modules, looked_for = set(), set()
    for table in (SINKS, SOURCES):
        for type_, target in table.items():
            modules.add(target.partition(":")[0])
            if type_ in smoke.BACKENDS:
                looked_for.add(target.partition(":")[0])

    assert looked_for == modules - {"relay.backends.outbox"}
