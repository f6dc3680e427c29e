"""Many gradients of a small model, to see whether memory grows with them.

    python tests/benchmarks/soak.py [--pushes N]

Samples the resident memory of server and worker a hundred times. Fails if the median of the last tenth is above that of
the first, which begins after a warm-up, by more than a hundredth and 1 MB.
"""

import argparse
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.round_trips.contenders import ORMO, module
from benchmarks.round_trips.place import Place
from benchmarks.round_trips.team import started

SIZE = 1_000_000
_WARM_UP_PUSHES = 200
_SAMPLES = 100
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Memory:
    """Resident bytes of a process, at even distances."""

    samples: tuple[int, ...]

    @property
    def first(self) -> float:
        """Median of the first tenth."""
        return median(self.samples[: max(1, len(self.samples) // 10)])

    @property
    def last(self) -> float:
        """Median of the last tenth."""
        return median(self.samples[-max(1, len(self.samples) // 10) :])

    @property
    def is_flat(self) -> bool:
        """Whether the last tenth is no larger than the first, but for what the allocator may move."""
        return self.last <= 1.01 * self.first + _MEGABYTE

    def __str__(self) -> str:
        return f"{self.first / 1e6:.1f} MB at first, {self.last / 1e6:.1f} MB at last"


def soaked(pushes: int) -> tuple[Memory, Memory]:
    """Memory of server and worker while so many gradients are pushed."""
    with tempfile.TemporaryDirectory() as folder:
        place = Place(SIZE // 4, 1, 0, "", Path(folder))
        with started(ORMO, place) as (server, address, _):
            round_trip = module(ORMO).connect(Place(SIZE // 4, 1, 0, address, Path(folder)))
            for _ in range(_WARM_UP_PUSHES):
                round_trip()
            samples = [(resident(server.pid), resident(os.getpid()))]
            for push in range(pushes):
                round_trip()
                if (push + 1) % max(1, pushes // _SAMPLES) == 0:
                    samples.append((resident(server.pid), resident(os.getpid())))
    of_server, of_worker = zip(*samples, strict=True)
    return Memory(of_server), Memory(of_worker)


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def main() -> None:
    """Print the figures; fail if memory grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pushes", type=int, default=20_000)
    pushes = parser.parse_args().pushes
    server, worker = soaked(pushes)
    sys.stdout.write(f"{pushes} pushes of {SIZE / 1e6:g} MB. Server: {server}. Worker: {worker}.\n")
    if not (server.is_flat and worker.is_flat):
        sys.exit("memory grew")


if __name__ == "__main__":
    main()
