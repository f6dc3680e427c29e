"""The table of workers, as wide as there is room for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.console.figures import NOT_KNOWN, Rates, rate, shortened

# In multiples of K, the delay that K workers of one speed have. From 2K on the steps of `ormo-da` get smaller.
LATE, VERY_LATE = 2, 4
ON_TIME_COLOUR, LATE_COLOUR, VERY_LATE_COLOUR = "green", "yellow", "red"
_NAME_WIDTH = 28
_BAR_WIDTH = 10


@dataclass(frozen=True, slots=True)
class Row:
    """One worker.

    Attributes:
        worker: as the server tells.
        per_second: its updates; None if not known.
        bucket_size: K, what its delay is judged by.
    """

    worker: pb.WorkerStatus
    per_second: float | None
    bucket_size: int

    def colour(self, delay: float) -> str:
        """How late a delay is."""
        if delay <= LATE * self.bucket_size:
            return ON_TIME_COLOUR
        return LATE_COLOUR if delay <= VERY_LATE * self.bucket_size else VERY_LATE_COLOUR

    @property
    def share_computing(self) -> float | None:
        """Of the time that its last ticket was out; None if either is not known."""
        worker = self.worker
        if not worker.compute_seconds or not worker.ticket_seconds:
            return None
        return min(1.0, worker.compute_seconds / worker.ticket_seconds)


def rows(status: pb.GetStatusResponse, rates: Rates | None, sort: str) -> list[Row]:
    """A row per worker, those that need attention first."""
    per_second = rates.workers if rates else {}
    made = [
        Row(worker, per_second.get(worker.worker), max(1, status.bucket_size))
        for worker in sorted(status.workers, key=lambda worker: worker.worker)
    ]
    return made if sort == "worker" else sorted(made, key=_ORDERS[sort])


_ORDERS: dict[str, Callable[[Row], float]] = {
    "delay": lambda row: -row.worker.smoothed_delay,
    "rate": lambda row: float("inf") if row.per_second is None else row.per_second,
    "silent": lambda row: -row.worker.silent_seconds,
}


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the table.

    Attributes:
        title: over it.
        cell: what it shows of a row.
        dispensable: where there is no room, the highest goes first; 0 stays.
        left: whether it is text.
    """

    title: str
    cell: Callable[[Row], RenderableType]
    dispensable: int
    left: bool = False


def _name(row: Row) -> RenderableType:
    colour = row.colour(_smoothed(row))
    # Only what is late stands out.
    return Text(shortened(row.worker.worker, _NAME_WIDTH), style="" if colour == ON_TIME_COLOUR else colour)


def _smoothed(row: Row) -> float:
    return row.worker.smoothed_delay


def _delay(delay: Callable[[Row], float], form: str) -> Callable[[Row], RenderableType]:
    return lambda row: Text(format(delay(row), form), style=row.colour(delay(row)))


def _bar(row: Row) -> RenderableType:
    full = VERY_LATE * row.bucket_size
    return Bar(full, 0, min(full, _smoothed(row)), width=_BAR_WIDTH, color=row.colour(_smoothed(row)))


def _seconds(seconds: float) -> RenderableType:
    return Text(f"{seconds:.3f} s" if seconds else NOT_KNOWN)


def _age(row: Row) -> RenderableType:
    return Text(f"{row.worker.push_age_seconds:.1f} s" if row.worker.HasField("push_age_seconds") else NOT_KNOWN)


def _loss(row: Row) -> RenderableType:
    return Text(f"{row.worker.last_loss:.4f}" if row.worker.HasField("last_loss") else NOT_KNOWN)


def _share(row: Row) -> RenderableType:
    return Text(NOT_KNOWN if row.share_computing is None else f"{row.share_computing:.0%}")


_LIVE_ONLY = ("per s", "")
_LOCAL_STEPS = "steps"  # of a run that has them
_COLUMNS = (
    _Column("worker", _name, 0, left=True),
    _Column("rank", lambda row: Text(str(row.worker.rank)), 11),
    _Column("slots", lambda row: Text(str(row.worker.slots)), 10),
    _Column("updates", lambda row: Text(f"{row.worker.applied:,}"), 3),
    _Column(_LOCAL_STEPS, lambda row: Text(f"{row.worker.local_steps:,}"), 7),
    _Column("per s", lambda row: Text(rate(row.per_second)), 1),
    _Column("", _bar, 4, left=True),
    _Column("delay", _delay(_smoothed, ".1f"), 0),
    _Column("last", _delay(lambda row: row.worker.last_delay, ",d"), 5),
    _Column("largest", lambda row: Text(f"{row.worker.max_delay:,}"), 6),
    _Column("compute", lambda row: _seconds(row.worker.compute_seconds), 2),
    _Column("ticket", lambda row: _seconds(row.worker.ticket_seconds), 3),
    _Column("computing", _share, 9),
    _Column("loss", _loss, 8),
    _Column("heard", lambda row: Text(f"{row.worker.silent_seconds:.1f} s"), 5),
    _Column("pushed", _age, 7),
)


def workers_table(console: Console, rows: Sequence[Row], width: int, *, live: bool) -> Table:
    """The table, with as many columns as fit.

    Args:
        console: that it is for.
        rows: that it has.
        width: that it may have.
        live: with what only a live view knows.
    """
    hidden = set() if live else {*_LIVE_ONLY}
    hidden |= set() if any(row.worker.local_steps for row in rows) else {_LOCAL_STEPS}
    columns = [column for column in _COLUMNS if column.title not in hidden]
    while True:
        table = _table(columns, rows)
        most = max(column.dispensable for column in columns)
        # A measurement is never wider than what it is made for.
        needed = console.measure(table, options=console.options.update(width=width + 1)).maximum
        if not most or needed <= width:
            return table
        columns = [column for column in columns if column.dispensable < most]


def _table(columns: Sequence[_Column], rows: Sequence[Row]) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column.title, justify="left" if column.left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    return table
