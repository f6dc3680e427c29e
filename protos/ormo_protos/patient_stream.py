"""A program's own stdout and stderr, which may be closed, full, or a pipe that nobody reads."""

import io
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

# How long a reader that is only slow is waited for, once: whoever logs may hold a lock that everybody waits for.
_PATIENCE_SECONDS = 1.0
# What a pipe takes whole, or not at all, once `poll` says that it takes something.
_PIECE_BYTES = select.PIPE_BUF
_APOLOGY = "({} lines were left out)\n".format


class PatientStream:
    """Writes to a descriptor what it takes, and leaves the rest out instead of waiting or failing.

    Made for a `logging.StreamHandler`, which writes one line at a time.

    Args:
        descriptor: to write to.
        apology: makes a line, to go before the first one after a gap, of how many were left out.
        encoding: of lines; what it lacks is written as escapes.
    """

    def __init__(self, descriptor: int, apology: Callable[[int], str] = _APOLOGY, encoding: str = "utf-8") -> None:
        self._descriptor = descriptor
        self._encoding = encoding
        self._apology = apology
        self._left_out = 0
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def write(self, line: str) -> None:
        """Write a line that has its end, or leave it out; a long one may be cut."""
        if self._left_out:
            line = f"\n{self._apology(self._left_out)}{line}"  # what came before may have been cut
        try:
            taken = self._taken(line.encode(self._encoding, errors="backslashreplace"))
        except OSError:  # no room, no reader, or closed
            taken = False
        self._left_out = 0 if taken else self._left_out + 1

    def _taken(self, data: bytes) -> bool:
        while data:
            # After a line that was left out nothing is waited for: each would cost as long.
            if not self._poll.poll(0 if self._left_out else 1000 * _PATIENCE_SECONDS):
                return False
            data = data[os.write(self._descriptor, data[:_PIECE_BYTES]) :]
        return True

    def flush(self) -> None:
        """Nothing is held back."""


def patient(stream: TextIO, apology: Callable[[int], str] = _APOLOGY) -> PatientStream | TextIO:
    """What writes where the stream does; the stream itself if that is no descriptor, as in a notebook."""
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:
        return stream
    return PatientStream(descriptor, apology, stream.encoding)


def open_standard_streams() -> None:
    """Let a program that was started without stdin, stdout or stderr have empty ones.

    Else its next three files come to be in their place, and lines that are meant for people are written into them.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8")  # noqa: SIM115 - until the program ends
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8")  # noqa: SIM115
