"""Keeps every file that a server writes: by hard links, which stay when it removes its own."""

import contextlib
import os
import threading
from pathlib import Path

_EVERY_SECONDS = 0.02


class Archive:
    """Watches the directory of a run; each life of the server has a folder of its own.

    Args:
        run: directory that the server was given.
        folder: for the lives, on the same file system.
    """

    def __init__(self, run: Path, folder: Path) -> None:
        self._run = run
        self.folder = folder
        self.lives = 0
        self._looking = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def begin_life(self) -> Path:
        """A server starts: to be called while none runs. Returns the life's folder."""
        self.look()  # the rest of the life before
        with self._looking:
            life = self.folder / f"life-{self.lives + 1:05d}"
            life.mkdir(parents=True)
            self.lives += 1
        if self._thread.ident is None:
            self._thread.start()
        return life

    def close(self) -> None:
        """Take what is left, and stop."""
        if self._thread.ident is not None:
            assert self._thread.is_alive(), "nobody has looked for a while: the archive is not whole"
            self._over.set()
            self._thread.join()
        self.look()

    def _watch(self) -> None:
        while not self._over.wait(_EVERY_SECONDS):
            self.look()

    def look(self) -> None:
        """Link what is new."""
        with self._looking:
            if not self.lives:
                return
            life = self.folder / f"life-{self.lives:05d}"
            for folder in [self._run / "journal", *_listed(self._run, "checkpoint-*")]:
                for path in _listed(folder, "*"):
                    kept = life / path.relative_to(self._run)
                    with contextlib.suppress(FileNotFoundError):
                        _keep(path, kept)


def _keep(path: Path, kept: Path) -> None:
    # A log that the disk had no room for is removed, and made again under the same name: the second one counts.
    if kept.exists() and kept.samefile(path):
        return
    kept.parent.mkdir(exist_ok=True)
    linked = kept.with_name("linked")
    os.link(path, linked)
    linked.replace(kept)


def _listed(folder: Path, names: str) -> list[Path]:
    """What there is now; nothing in a folder that has gone meanwhile."""
    try:
        return sorted(path for path in folder.iterdir() if path.match(names))
    except FileNotFoundError:
        return []
