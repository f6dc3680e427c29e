"""This project with bfloat16 on the wire: half the bytes, for links that are slower than memory."""

from benchmarks.round_trips.contenders import ormo
from benchmarks.round_trips.place import Place, RoundTrip

serve = ormo.serve


def connect(place: Place) -> RoundTrip:
    """As with float32; the conversions are counted."""
    from ormo_protos.manifest import BFLOAT16

    return ormo.connect(place, BFLOAT16)
