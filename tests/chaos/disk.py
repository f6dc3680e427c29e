"""The disk of a run, which can be full or slow.

Where mounting is permitted it is a file system in memory, of the run's own, that really has no room when it is full,
for the journal, for checkpoints, and for whatever else. Elsewhere a layer in the server's process stands for that,
which only the journal meets. What makes the disk slow is that layer in both cases.
"""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

_MOST_BYTES = 8 << 30
_SHARE_OF_MEMORY = 0.4
_ATTEMPTS = 20


class Disk:
    """Where the server writes, and where all that it wrote is kept.

    Args:
        folder: of the run; this makes a folder in it.
        mounting: whether this process may mount, in a namespace of its own.

    Attributes:
        path: of the disk.
        control: file through which the layer is told; see `faulty_server`.
        is_real: whether it is a file system of its own.
    """

    def __init__(self, folder: Path, *, mounting: bool) -> None:
        self.path = folder / "disk"
        self.path.mkdir()
        self.control = folder / "disk.json"
        self._size = min(_MOST_BYTES, int(_SHARE_OF_MEMORY * psutil.virtual_memory().available))
        self._began = time.monotonic()
        self.is_real = mounting and self._mount("-t", "tmpfs", "-o", f"size={self._size}", "tmpfs")

    @property
    def used_bytes(self) -> int:
        """Of a real one."""
        about = os.statvfs(self.path)
        return (about.f_blocks - about.f_bfree) * about.f_frsize

    def lasts(self, seconds: float) -> bool:
        """Whether a run can go on for so long, at its pace so far."""
        if not self.is_real:
            return True
        pace = self.used_bytes / (time.monotonic() - self._began)
        return self.used_bytes + pace * seconds < self._size

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Inside, there is no room."""
        if self.is_real:
            self._shrink()
        else:
            self._tell(full=True)
        try:
            yield
        finally:
            if self.is_real:
                assert self._mount("-o", f"remount,size={self._size}")
            else:
                self._tell()

    @contextlib.contextmanager
    def slow(self, sync_seconds: float) -> Iterator[None]:
        """Inside, every fsync takes so long."""
        self._tell(sync_seconds=sync_seconds)
        try:
            yield
        finally:
            self._tell()

    def faults(self) -> int:
        """How often the layer was in somebody's way so far."""
        felt = self.control.with_suffix(".felt")
        return felt.stat().st_size if felt.exists() else 0

    @property
    def free_bytes(self) -> int:
        """Of a real one, for the server."""
        about = os.statvfs(self.path)
        return about.f_bavail * about.f_frsize

    def rescue(self, target: Path) -> None:
        """Copy all that is on a real one, since it goes with this process; links stay links."""
        if self.is_real:
            subprocess.run(["cp", "--archive", self.path, target], check=True)

    def remove(self) -> None:
        """All that was on it is gone."""
        if self.is_real:
            subprocess.run(["umount", self.path], check=True)

    def _shrink(self) -> None:
        for attempt in range(_ATTEMPTS):  # the server writes meanwhile
            if self._mount("-o", f"remount,size={self.used_bytes + attempt * 4096}"):
                return
        raise AssertionError("the disk can't be made full")

    def _mount(self, *words: str) -> bool:
        return subprocess.run(["mount", *words, self.path], capture_output=True, check=False).returncode == 0

    def _tell(self, **state: Any) -> None:
        aside = self.control.with_suffix(".new")
        aside.write_text(json.dumps(state))
        aside.replace(self.control)
