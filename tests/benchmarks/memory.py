"""How much memory the server takes for each exchange that is under way.

    python tests/benchmarks/memory.py [--case BYTES WORKERS MOST ...]

Measured in a server that has given back what it had freed before: in any other what the offer of the model has freed is
used first. The payload of its first exchange, which it keeps, is counted. Fails if an exchange takes more than so many
times the model's bytes.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.round_trips.contenders import RETURNING
from benchmarks.round_trips.place import Place
from benchmarks.round_trips.team import joined, started
from benchmarks.soak import resident

_WINDOWS, _SECONDS = 2, 8.0


class Case(NamedTuple):
    """What is measured.

    Attributes:
        size: of the model, in bytes of float32.
        workers: that make exchanges at the same time.
        most: times its size that one of them may take.
    """

    size: int
    workers: int
    most: float


# What the results page tells of.
CASES = (Case(45_000_000, 16, 1.25), Case(400_000_000, 1, 1.1))


def times_the_model(size: int, workers: int) -> float:
    """How many times the model's bytes each of so many exchanges takes of the server's memory."""
    with tempfile.TemporaryDirectory(prefix="ormo-bench-") as folder:
        place = Place(size // 4, workers, 0, "", Path(folder))
        with started(RETURNING, place) as (server, address, metrics):
            place = replace(place, address=address)
            with joined(RETURNING, replace(place, workers=1), server, metrics):
                pass  # it has offered the model, and made an exchange
            held = _held(server) - size
            with joined(RETURNING, place, server, metrics) as team:
                for _ in range(_WINDOWS):
                    team.window(_SECONDS)
                return (team.peak_bytes() - held) / workers / size


def _held(server: subprocess.Popen[str]) -> int:
    """Bytes of a server that has given back what it does not use; its peak is counted from now on."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write("\n")
    assert server.stdout.readline() == "given back\n"
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")
    return resident(server.pid)


def main() -> None:
    """Print the figures; fail if one is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=3, action="append", metavar=("BYTES", "WORKERS", "MOST"))
    asked = [Case(int(size), int(workers), float(most)) for size, workers, most in parser.parse_args().case or ()]
    over = False
    for case in asked or CASES:
        found = times_the_model(case.size, case.workers)
        over |= found > case.most
        what = f"{case.workers} × {case.size / 1e6:g} MB"
        sys.stdout.write(f"{what}: {found:.3f} × the model each, at most {case.most}\n")
        sys.stdout.flush()
    if over:
        sys.exit("an exchange takes more memory than that")


if __name__ == "__main__":
    main()
