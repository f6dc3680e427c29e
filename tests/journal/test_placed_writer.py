"""Bytes come to their places whole, whichever way they are written."""

import errno
import mmap
import os
import random
from pathlib import Path
from typing import Any

import pytest

from ormo_server.journal import gradients
from ormo_server.journal.gradients import _LARGE_BYTES as LARGE_BYTES
from ormo_server.journal.gradients import PlacedWriter, place_after

PAGE = mmap.PAGESIZE


def aligned(data: bytes) -> memoryview:
    memory = mmap.mmap(-1, len(data) + PAGE)
    memory[: len(data)] = data
    return memoryview(memory)[: len(data)]


def random_bytes(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """For each write: whether it went past the page cache, and its size."""
    seen: list[tuple[bool, int]] = []
    real = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        flags = int(Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("flags:")[1].split()[0], 8)
        seen.append((bool(flags & os.O_DIRECT), len(data)))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return seen


def test_large_ones_go_past_the_page_cache_but_for_their_ends(tmp_path: Path, writes: list[tuple[bool, int]]) -> None:
    writer = PlacedWriter(tmp_path / "a", LARGE_BYTES)
    if writer._direct is None:
        pytest.skip("this file system has no direct writes")
    writer.write(aligned(random_bytes(300_000)), 0)
    assert writes == [(True, 73 * PAGE), (False, 300_000 - 73 * PAGE)]


def test_what_is_smaller_than_asked_for_goes_through_the_page_cache_in_pieces(
    tmp_path: Path, writes: list[tuple[bool, int]]
) -> None:
    writer, data = PlacedWriter(tmp_path / "a", 4 << 20), random_bytes(2_500_000)
    writer.write(aligned(data), 0)
    # In pieces: one large write through the cache takes ten times as long.
    assert writes == [(False, 1 << 20), (False, 1 << 20), (False, 2_500_000 - (2 << 20))]
    assert (tmp_path / "a").read_bytes() == data


def test_places_of_all_sizes_hold_what_was_written_to_them(tmp_path: Path) -> None:
    dice, end, writer = random.Random(0), 0, PlacedWriter(tmp_path / "a", LARGE_BYTES)
    places = []
    for _ in range(40):
        size = dice.choice([36, 5000, 262_143, 262_144, 300_001, 1_081_344])
        data, offset = random_bytes(size), place_after(end, size)
        end = offset + size
        writer.write(aligned(data) if dice.random() < 0.7 else memoryview(data), offset)
        places.append((offset, data))
    writer.sync()
    writer.close()
    content = (tmp_path / "a").read_bytes()
    assert all(content[offset : offset + len(data)] == data for offset, data in places)
    assert len(content) == end < sum(len(data) for _, data in places) + 40 * PAGE


def test_small_ones_lie_side_by_side() -> None:
    assert place_after(36, 36) == 36
    assert place_after(36, 1 << 20) == PAGE
    assert place_after(PAGE, 1 << 20) == PAGE


@pytest.mark.parametrize("failing", ["open", "write"])
def test_where_it_cant_be_done_the_page_cache_does_it(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open, real_write, direct = os.open, os.pwrite, []

    def opened(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT and failing == "open":
            raise OSError(errno.EINVAL, "not here")
        descriptor = real_open(path, flags, mode)
        if flags & os.O_DIRECT:
            direct.append(descriptor)
        return descriptor

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "not so")
        return real_write(descriptor, data, offset)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "pwrite", pwrite)
    writer, data = PlacedWriter(tmp_path / "a", LARGE_BYTES), random_bytes(500_000)
    writer.write(aligned(data), 0)
    assert (tmp_path / "a").read_bytes() == data
    assert gradients._DIRECT == os.O_DIRECT
