"""A disk that tells what came, and fails when told."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOM = errno.ENOSPC


def kind_of(descriptor: int) -> str:
    kinds = {".log": "log", ".bin": "gradients"}
    path = Path(f"/proc/self/fd/{descriptor}").readlink()
    return "mark" if path.name.startswith("acknowledged-") else kinds.get(path.suffix, "directory")


class Disk:
    """Stands in for the system's calls; tells which came, on which file, and fails them when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self.failing: dict[tuple[str, str], OSError] = {}
        self.written_at_once = 1 << 30
        self.before: Callable[[str, str], object] = lambda call, kind: None
        self._pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", self._write)
        for call in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, call, self._synced(call, getattr(os, call)))

    def fail(self, call: str, kind: str, number: int) -> None:
        self.failing[call, kind] = OSError(number, os.strerror(number))

    def _note(self, call: str, descriptor: int) -> str:
        kind = kind_of(descriptor)
        self.before(call, kind)
        self.calls.append((call, kind))
        if (call, kind) in self.failing:
            raise self.failing[call, kind]
        return kind

    def _write(self, descriptor: int, data: Any, offset: int) -> int:
        kind = kind_of(descriptor)
        if ("pwrite", kind) in self.failing and self.failing["pwrite", kind].errno == ROOM:
            self._pwrite(descriptor, bytes(data[:5]), offset)  # a disk fills up in the middle of a write
        self._note("pwrite", descriptor)
        return self._pwrite(descriptor, data[: self.written_at_once], offset)

    def _synced(self, call: str, real: Callable[[int], None]) -> Callable[[int], None]:
        def sync(descriptor: int) -> None:
            self._note(call, descriptor)
            real(descriptor)

        return sync
