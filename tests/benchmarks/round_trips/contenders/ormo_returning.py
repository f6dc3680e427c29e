"""This project, with a server that gives what it has freed back to the system at each line on stdin, and says so."""

import ctypes
import sys
import threading

from benchmarks.round_trips.contenders import ormo
from benchmarks.round_trips.place import Place
from ormo_runtime.process import keep_freed_memory
from ormo_server import cli

connect = ormo.connect


def serve(place: Place) -> None:
    """Be the server's program."""
    cli.keep_freed_memory = _keep_until_told  # type: ignore[attr-defined]
    sys.exit(cli.main(ormo.arguments(place)))


def _keep_until_told() -> bool:
    # In this order: a thread that is there before has an arena of its own, and another memory would be measured.
    kept = keep_freed_memory()
    threading.Thread(target=_give_back_when_told, name="returning", daemon=True).start()
    return kept


def _give_back_when_told() -> None:
    for _ in sys.stdin:
        ctypes.CDLL(None).malloc_trim(0)
        sys.stdout.write("given back\n")
        sys.stdout.flush()
