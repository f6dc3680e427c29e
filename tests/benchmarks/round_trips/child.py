"""One process of a contender: `python -m benchmarks.round_trips.child ROLE NAME ELEMENTS WORKERS RANK ADDRESS FOLDER`.

A server says where it serves. A worker says that it is ready, and for each line on stdin, "trips N" or "seconds S",
makes so many round trips and says, as JSON, how many, in how many seconds, and with how much processor time.
"""

import json
import sys
import time
from pathlib import Path

from benchmarks.round_trips.contenders import module
from benchmarks.round_trips.place import Place, RoundTrip


def main() -> None:
    """Be what the command line says."""
    role, name, elements, workers, rank, address, folder = sys.argv[1:]
    place = Place(int(elements), int(workers), int(rank), address, Path(folder))
    if role == "server":
        module(name).serve(place)
    round_trip = module(name).connect(place)
    round_trip()
    _say("ready")
    for line in sys.stdin:
        _say(json.dumps(_timed(round_trip, *line.split())))


def _timed(round_trip: RoundTrip, what: str, amount: str) -> dict[str, float]:
    processor, began, trips = time.process_time(), time.perf_counter(), 0
    limit = float(amount)
    while (trips if what == "trips" else time.perf_counter() - began) < limit:
        round_trip()
        trips += 1
    seconds = time.perf_counter() - began
    return {"trips": trips, "seconds": seconds, "processor_seconds": time.process_time() - processor}


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
