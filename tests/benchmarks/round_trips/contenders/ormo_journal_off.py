"""This project with a journal that is safe from a crash of the server; from a power cut when the system sees fit."""

from benchmarks.round_trips.contenders import ormo
from benchmarks.round_trips.place import Place

connect = ormo.connect


def serve(place: Place) -> None:
    """Become the server's program."""
    ormo.serve(place, "--journal", "--journal-fsync", "off")
