"""Which writer a directory is, for the mirror."""

import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from ormo_server.store.files import StoreError, sync

IDENTITY = "mirror.json"


@dataclass(frozen=True, slots=True)
class Writer:
    """One `--directory` on one disk, by the name of its folder in the mirror.

    Attributes:
        name: drawn when the directory is first mirrored; it begins with the date, for people.
        continues: the writers whose run is in the directory now, the last one first.
        before: who was the writer of this directory before it began a new run; empty if nobody was. It is dead.
    """

    name: str
    continues: tuple[str, ...] = ()
    before: str = ""


def read_writer(directory: Path) -> Writer | None:
    """Who this directory is; None if it never was mirrored, or is a copy of one that was.

    Raises:
        StoreError: its file can't be read.
    """
    path = directory / IDENTITY
    try:
        said = json.loads(path.read_bytes())
        # A copy would be a second writer of the same name, and the first may live.
        return Writer(said["writer"], tuple(said["continues"])) if said["inode"] == path.stat().st_ino else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"{path} can't be read ({error}): remove it, and the directory is mirrored as a new one"
        ) from error


def write_writer(directory: Path, writer: Writer) -> None:
    """Have the directory know who it is; it is on the disk when this returns.

    Raises:
        StoreError: it can't be written.
    """
    path = directory / IDENTITY
    aside = directory / f".{IDENTITY}"
    try:
        with aside.open("w", encoding="utf-8") as file:
            said = {"writer": writer.name, "continues": writer.continues, "inode": aside.stat().st_ino}
            file.write(json.dumps(said) + "\n")
        sync(aside)
        aside.replace(path)
        sync(directory)
    except OSError as error:
        raise StoreError(f"{path} can't be written ({error}): make room there or mend the disk") from error


def new_writer(continues: tuple[str, ...] = (), before: str = "") -> Writer:
    """A writer of whom nobody has heard."""
    return Writer(f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}", continues, before)
