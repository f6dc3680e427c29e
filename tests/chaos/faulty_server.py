"""The server with a disk that can be made slow or full: `python -m chaos.faulty_server CONTROL LIFE serve ...`.

The file CONTROL holds JSON, read at every use of the disk: `{"sync_seconds": 0.1, "full": true}`. Files of the journal
that the server removes stay in the folder LIFE: after a full disk it makes and removes some faster than anybody could
look.
"""

import contextlib
import errno
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def control(path: Path) -> dict[str, Any]:
    """What the disk is like now."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def felt(path: Path) -> None:
    """Note that a fault was in this process's way."""
    with path.with_suffix(".felt").open("ab") as file:
        file.write(b".")


def make_faulty(path: Path) -> None:
    """Put the faults between this process and its disk."""
    real_write = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if control(path).get("full"):
            # A disk fills up in the middle of a write.
            real_write(descriptor, memoryview(data)[: len(data) // 4096 * 4096 // 2], offset)
            felt(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(descriptor, data, offset)

    def slowed(sync: Callable[[int], None]) -> Callable[[int], None]:
        def slow(descriptor: int) -> None:
            seconds = control(path).get("sync_seconds", 0.0)
            if seconds:
                felt(path)
                threading.Event().wait(seconds)  # libfaketime breaks `time.sleep`
            sync(descriptor)

        return slow

    os.pwrite = pwrite
    os.fsync, os.fdatasync = slowed(os.fsync), slowed(os.fdatasync)


def keep_what_is_removed(life: Path) -> None:
    """Link a journal's file before it goes."""
    real_unlink = os.unlink

    def unlink(path: Any, **how: Any) -> None:
        kept = life / "journal" / Path(path).name
        if Path(path).parent.name == "journal" and not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                os.link(path, kept)
        real_unlink(path, **how)

    os.unlink = unlink


def main() -> None:
    """Serve."""
    make_faulty(Path(sys.argv[1]))
    keep_what_is_removed(Path(sys.argv[2]))
    from ormo_server.cli import main as serve

    raise SystemExit(serve(sys.argv[3:]))


if __name__ == "__main__":
    main()
