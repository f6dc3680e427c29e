"""This project with a journal that is safe from a power cut before each answer."""

from benchmarks.round_trips.contenders import ormo
from benchmarks.round_trips.place import Place

connect = ormo.connect


def serve(place: Place) -> None:
    """Become the server's program."""
    ormo.serve(place, "--journal")
