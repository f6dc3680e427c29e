"""How much memory processes have, second by second, and whether it grows."""

import threading
import time
from dataclasses import dataclass, field
from statistics import median

import psutil

_EVERY_SECONDS = 1.0
# Shorter lives are a start and little else.
LEAST_SECONDS = 12.0
_LEAST_LIVES = 9
SERVER = "the server"

Sample = tuple[float, int]  # moment of the monotonic clock, bytes


@dataclass
class Life:
    """A process, from when it had settled down.

    Attributes:
        who: which it was.
        samples: of its resident memory, in order.
    """

    who: str
    samples: list[Sample] = field(default_factory=list)

    @property
    def is_server(self) -> bool:
        """Whether it was one of the server's lives."""
        return self.who.startswith(f"{SERVER},")

    @property
    def is_long(self) -> bool:
        """Whether its growth can be told from its start."""
        return len(self.samples) >= 8 and self.samples[-1][0] - self.samples[0][0] >= LEAST_SECONDS

    def growth(self) -> str | None:
        """A sentence, if it ended with much more than it had early in its life."""
        sizes, quarter = [size for _, size in self.samples], len(self.samples) // 4
        early, late = sizes[quarter : 2 * quarter], sizes[-quarter:]  # a busy machine leaves seconds out
        return _grown(f"the memory of {self.who}", median(early), median(late))


def grown(lives: list[Life]) -> list[str]:
    """One sentence for each process that grows, and one if each life of the server begins where the last one ended."""
    found = [life.growth() for life in lives if life.is_long]
    ends = server_ends(lives)
    third = len(ends) // 3
    if len(ends) >= _LEAST_LIVES:
        found.append(_grown("the server's memory from life to life", median(ends[:third]), median(ends[-third:])))
    return [sentence for sentence in found if sentence is not None]


def unmeasured(lives: list[Life]) -> list[str]:
    """Whose growth can't be told."""
    known = {life.is_server for life in lives if life.is_long}
    if len(server_ends(lives)) >= _LEAST_LIVES:
        known.add(True)
    return [name for name, is_server in ((SERVER, True), ("the workers", False)) if is_server not in known]


def server_ends(lives: list[Life]) -> list[int]:
    """Bytes at the end of each life of the server that was long enough."""
    mine = [life.samples for life in lives if life.is_server]
    return [samples[-1][1] for samples in mine if samples and samples[-1][0] - samples[0][0] > 1.0]


def _grown(what: str, early: float, late: float) -> str | None:
    if late <= 1.2 * early + 20e6:
        return None
    return f"{what} grew from {early / 1e6:.0f} to {late / 1e6:.0f} MB"


class Sampler:
    """Looks once a second."""

    def __init__(self) -> None:
        self.samples: dict[str, list[Sample]] = {}  # by name and process
        self._watched: dict[str, psutil.Process] = {}
        self._looking = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def watch(self, name: str, pid: int) -> None:
        """Look at this process too, until it ends."""
        with self._looking:
            self._watched[life_name(name, pid)] = psutil.Process(pid)
        self.look()

    def look(self) -> None:
        """Note what each has now."""
        with self._looking:
            for name, process in list(self._watched.items()):
                try:
                    size = process.memory_info().rss
                except psutil.NoSuchProcess:
                    size = 0
                if size:
                    self.samples.setdefault(name, []).append((time.monotonic(), size))
                else:  # a zombie has none
                    del self._watched[name]

    def close(self) -> None:
        """Stop."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_EVERY_SECONDS):
            self.look()


def life_name(name: str, pid: int) -> str:
    """How a process is called."""
    return f"{name}, process {pid}"
