"""A mark of what was acknowledged, for the lines that no other line comes after to say so.

It is written in place before each answer, and never waited for: it outlives the process like all that the system took,
and after a power cut it is older than the truth, never ahead of lines that were waited for.
"""

import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from ormo_server.journal.chain import Place
from ormo_server.journal.log_file import new_file
from ormo_server.journal.records import MARK_NAME, numbered
from ormo_server.store.files import reading

_MARK = re.compile(rb"([0-9a-f]{8}) (\d{12} \d{12})\n")


class Mark:
    """One server's, in a file of its own.

    Args:
        directory: of the journal.
        log: number of the server's first log.

    Raises:
        OSError: the file can't be made.
    """

    def __init__(self, directory: Path, log: int) -> None:
        self._descriptor = new_file(directory / f"acknowledged-{log:08d}")

    def move(self, place: Place) -> None:
        """What is up to here may be told from now on."""
        text = b"%012d %012d" % place
        try:
            os.pwrite(self._descriptor, b"%08x %s\n" % (zlib.crc32(text), text), 0)
        except OSError:
            return  # an old mark says less, and nothing wrong

    def close(self) -> None:
        """Let it go."""
        os.close(self._descriptor)


def marks(directory: Path) -> Iterator[Place]:
    """All that can be read.

    Raises:
        StoreError: a file can't be read.
    """
    with reading(directory):
        found = numbered(directory, MARK_NAME)
    for path in found.values():
        with reading(path):
            match = _MARK.fullmatch(path.read_bytes())
        if match is not None and int(match[1], 16) == zlib.crc32(match[2]):
            yield Place(*map(int, match[2].split()))
