"""What the settings of the interpreter and of the C library bring."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys

import pytest

from relay.process import rare_collections

# Page faults of a hundred batches, each of which makes some buffers of a megabyte and gives them
# back.
_FAULTS = """
import resource
from relay.process import keep_freed_memory
if {keeps}:
    keep_freed_memory()
def batch():
    [bytearray(1024 * 1024) for _ in range(8)]
batch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    batch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_what_exists_is_not_searched_for_cycles_and_a_batch_starts_no_search() -> None:
    before = gc.get_threshold()
    with rare_collections():
        assert gc.get_threshold()[0] >= 10 * before[0]
        assert gc.get_freeze_count() > 0
        searched = gc.get_stats()[0]["collections"]
        batch = [[number] for number in range(4000)]
        assert gc.get_stats()[0]["collections"] == searched

    assert len(batch) == 4000
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_thresholds_are_restored_after_an_error() -> None:
    before = gc.get_threshold()

    with pytest.raises(ValueError, match="broken"), rare_collections():
        raise ValueError("broken")

    assert gc.get_threshold() == before


def _faults(*, keeps: bool) -> int:
    script = _FAULTS.format(keeps=keeps)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_a_batch_has_freed_is_there_for_the_next() -> None:
    assert _faults(keeps=True) < 1000
    assert _faults(keeps=False) > 10_000


def test_a_c_library_without_that_setting_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    from relay import process

    monkeypatch.setattr(process.ctypes, "CDLL", lambda _name: object())

    process.keep_freed_memory()
