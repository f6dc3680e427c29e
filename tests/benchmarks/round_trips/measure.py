"""Turns about: the socket, a contender, the socket, the next one, so that a noisy moment does not hit one alone."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

from benchmarks.round_trips.contenders import SOCKET
from benchmarks.round_trips.team import Team, Turn, team

_TURN_SECONDS = 0.25
_MOST_TRIPS = 2000
_ALL_AT_ONCE_BYTES = 100_000_000


@dataclass(frozen=True)
class Case:
    """What is measured: a model of so many bytes and so many workers at once."""

    size: int
    workers: int

    @property
    def elements(self) -> int:
        """Of the model, float32."""
        return self.size // 4

    def __str__(self) -> str:
        unit, of = (1e6, "MB") if self.size >= 1e6 else (1e3, "KB")
        who = "worker" if self.workers == 1 else "workers"
        return f"{self.size / unit:.3g} {of}, {self.workers} {who}"


@dataclass
class Row:
    """What a contender showed in a case.

    Attributes:
        case: which.
        contender: its name.
        turns: its own.
        ratios: its seconds per round trip by the socket's in the turn before; with several workers, all of theirs.
        peak_bytes: the server's largest resident memory.
        stages: mean seconds of an exchange's stages, where the server tells them.
    """

    case: Case
    contender: str
    turns: list[Turn] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def seconds_per_trip(self) -> float:
        """Median over the turns: from one answer to the next, of whichever worker."""
        return median(turn.seconds / turn.trips for turn in self.turns)

    @property
    def gigabytes_per_second(self) -> float:
        """Of tensors, both ways together."""
        return 2 * self.case.size / self.seconds_per_trip / 1e9

    @property
    def processor_seconds_per_gigabyte(self) -> float:
        """Of server and workers."""
        trips = sum(turn.trips for turn in self.turns)
        return sum(turn.processor_seconds for turn in self.turns) / (2e-9 * self.case.size * trips)


def measured(case: Case, contenders: Sequence[str], pairs: int, window: float) -> list[Row]:
    """The contenders of a case, the socket first.

    Args:
        case: what to measure.
        contenders: names; the socket is always there.
        pairs: turns of each contender, each after one of the socket.
        window: seconds of a turn with several workers.
    """
    others = [name for name in contenders if name != SOCKET]
    socket_row = Row(case, SOCKET)
    if case.workers * case.size < _ALL_AT_ONCE_BYTES:
        return [socket_row, *_rows(case, others, socket_row, pairs, window)]
    # Two teams are all that a machine of some GB has room for.
    rows = [row for name in others for row in _rows(case, [name], socket_row, pairs, window)]
    return [socket_row, *rows]


def _rows(case: Case, names: Sequence[str], socket_row: Row, pairs: int, window: float) -> list[Row]:
    with ExitStack() as stack:
        socket = stack.enter_context(team(SOCKET, case.elements, case.workers))
        teams = [stack.enter_context(team(name, case.elements, case.workers)) for name in names]
        turns = {each.name: _pace(each, case, window) for each in (socket, *teams)}
        rows = [Row(case, each.name) for each in teams]
        for _ in range(pairs):
            for row in rows:
                base, own = turns[SOCKET](), turns[row.contender]()
                socket_row.turns.append(base)
                row.turns.append(own)
                row.ratios.append((own.seconds / own.trips) / (base.seconds / base.trips))
        socket_row.peak_bytes = socket.peak_bytes()
        for row, each in zip(rows, teams, strict=True):
            row.peak_bytes, row.stages = each.peak_bytes(), each.stages()
        return rows


def _pace(team: Team, case: Case, window: float) -> Callable[[], Turn]:
    """A turn that is long enough to be timed, once the team is warm."""
    if case.workers > 1:
        team.window(window / 2)
        return lambda: team.window(window)
    first = team.trips(2)
    number = max(1, min(_MOST_TRIPS, int(_TURN_SECONDS * first.trips / first.seconds)))
    team.trips(number)
    return lambda: team.trips(number)
