"""Memory that is freed is kept by the process, and used again without the system's help."""

import ctypes
import json
import platform
import subprocess
import sys

import pytest

from ormo_runtime import process

GLIBC = platform.libc_ver()[0] == "glibc"
BLOCK_BYTES = 64 << 20
# A block is had from the C library itself, filled and freed, time and again: the first freed block may be used for
# something small, so that only the next one fits. Says what the last time did to the process.
PROGRAM = f"""
import ctypes, json, mmap, resource, sys
from ormo_runtime.process import keep_freed_memory

size, pages = {BLOCK_BYTES}, {BLOCK_BYTES} // mmap.PAGESIZE
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


told = keep_freed_memory() if sys.argv[1:] == ["keep"] else None
for _ in range(4):
    before = faults()
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    faulted, filled = faults() - before, resident()
    libc.free(block)
    freed = filled - resident()
print(json.dumps(dict(told=told, pages=pages, freed=freed, faulted=faulted)))
"""


def measured(*arguments: str) -> dict[str, int]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, int] = json.loads(ran.stdout)
    return found


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc: its allocator can't be told to keep memory")
def test_a_large_block_that_is_freed_stays_and_is_had_again_without_page_faults() -> None:
    found = measured("keep")
    assert found["told"]
    assert found["freed"] < BLOCK_BYTES // 16
    assert found["faulted"] < found["pages"] // 16


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc: what it does by default is not known")
def test_without_being_told_the_c_library_gives_it_back() -> None:
    """So that the test before this one shows what the call does, and not what happens anyway."""
    assert measured()["freed"] > BLOCK_BYTES // 2


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr(ctypes, "CDLL", loaded.append)
    assert process.keep_freed_memory() is False
    assert loaded == []


def test_settings_that_are_refused_are_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Refusing:
        def __init__(self, name: None) -> None:
            pass

        def mallopt(self, option: int, value: int) -> int:
            return 0 if option == -8 else 1

    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", Refusing)
    assert process.keep_freed_memory() is False
    assert "the allocator refused its settings [-8]" in caplog.text
