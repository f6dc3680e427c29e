"""`ormo-server top`: what it shows at one moment, and the keys that it knows."""

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.channels import through_proxy
from ormo_runtime.process import leave_if_asked, leave_on_signals
from ormo_server.console.client import Asker, NoAnswerError, RefusedError, asker
from ormo_server.console.figures import (
    Facts,
    History,
    duration,
    of_the_moment,
    phase_word,
    position,
    refusals,
    seconds_left,
    share_done,
    throughput,
)
from ormo_server.console.settings import TopSettings
from ormo_server.console.status import WIDE, no_answer
from ormo_server.console.workers import (
    LATE,
    LATE_COLOUR,
    ON_TIME_COLOUR,
    VERY_LATE,
    VERY_LATE_COLOUR,
    Row,
    rows,
    workers_table,
)


@contextmanager
def single_keys() -> Iterator[None]:
    """Inside, keys can be read at once and are not shown; afterwards the terminal is as before."""
    if not sys.stdin.isatty():
        yield
        return
    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    tty.setcbreak(number)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


def pressed(key: str, seconds: float) -> bool:
    """Whether the key is pressed within this many seconds; waits them all if it is not."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if not sys.stdin.isatty():
            time.sleep(left)
        elif select.select([sys.stdin], [], [], left)[0]:
            keys = os.read(sys.stdin.fileno(), 1024)
            if not keys or key.encode() in keys:  # none: the terminal is gone
                return True
    return False


_LINES_OF_TABLE_HEAD = 2
_GAP = 2
_BAR_WIDTHS = (10, 40)
_FACTS_A_LINE = 2


@dataclass(frozen=True, slots=True)
class View:
    """A screen full, or without `height` all there is to see.

    Attributes:
        server: its address.
        history: what it said.
        sort: which workers come first.
        height: lines that there are.
        trouble: why nothing newer is known; empty if all is well.
    """

    server: str
    history: History
    sort: str
    height: int | None = None
    trouble: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The parts, from top to bottom; workers get the lines that the others leave."""
        if self.trouble:
            yield Text(self.trouble, style="bold red", overflow="ellipsis", no_wrap=True)
        status = self.history.newest
        if status is None:
            return
        head, foot = Group(*self._head(status, console, options.max_width)), Group(*_foot(status))
        table = self._table(status, console, options, head, foot)
        parts = Group(head, table, foot)
        yield Styled(parts, "dim") if self.trouble else parts

    def _head(self, status: pb.GetStatusResponse, console: Console, width: int) -> Iterator[ConsoleRenderable]:
        version, up = status.version or "not known", duration(status.uptime_seconds)
        title = Text.assemble(
            (status.method, "bold cyan"),
            (f"  {phase_word(status.phase).replace('_', ' ')}", "bold"),
            f"  {self.server}, version {version}, up {up}",
        )
        yield _one_line(title)
        yield _progress(status, self.history, width)
        yield _grid({"throughput": throughput(self.history.rates), **of_the_moment(status)}, console, width)
        yield Text()

    def _table(
        self, status: pb.GetStatusResponse, console: Console, options: ConsoleOptions, *others: ConsoleRenderable
    ) -> ConsoleRenderable:
        all_rows = rows(status, self.history.rates, self.sort)
        if not all_rows:
            return Text("no workers", style="dim")
        shown = self._fitting(all_rows, sum(len(console.render_lines(part, options)) for part in others))
        table = workers_table(console, shown, options.max_width, live=True)
        left_out = len(all_rows) - len(shown)
        return Group(table, Text(f"… and {left_out} more", style="dim")) if left_out else table

    def _fitting(self, all_rows: Sequence[Row], lines_of_others: int) -> Sequence[Row]:
        if self.height is None:
            return all_rows
        lines = self.height - lines_of_others - _LINES_OF_TABLE_HEAD - bool(self.trouble)
        # One line is for how many are left out.
        return all_rows if len(all_rows) <= lines else all_rows[: max(1, lines - 1)]


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _progress(status: pb.GetStatusResponse, history: History, width: int) -> ConsoleRenderable:
    where, share = Text(position(status)), share_done(status)
    if share is None:
        return _one_line(where)
    left = seconds_left(status, history.rates)
    finished = status.phase == pb.GetStatusResponse.PHASE_FINISHED
    rest = Text(f"{share:.0%}" + (f", {duration(left)} left" if left is not None and not finished else ""))
    least, most = _BAR_WIDTHS
    bar_width = max(least, min(most, width - len(where) - len(rest) - 2 * _GAP))
    line = Table.grid(padding=(0, _GAP, 0, 0))
    for _ in range(3):
        line.add_column(no_wrap=True)
    line.add_row(where, ProgressBar(1.0, share, bar_width, complete_style="cyan", finished_style="green"), rest)
    return line


def _grid(facts: Facts, console: Console, width: int) -> Table:
    grid = _lines_of(facts, _FACTS_A_LINE)
    needed = console.measure(grid, options=console.options.update(width=width + 1)).maximum
    return grid if needed <= width else _lines_of(facts, 1)


def _lines_of(facts: Facts, number: int) -> Table:
    """A table with this many facts in a line."""
    grid = Table.grid(padding=(0, _GAP, 0, 0))
    for _ in range(number):
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(no_wrap=True)
    names = list(facts)
    for first in range(0, len(names), number):
        line = names[first : first + number]
        grid.add_row(*(Text(text) for name in line for text in (name, facts[name])))
    return grid


def _foot(status: pb.GetStatusResponse) -> Iterator[ConsoleRenderable]:
    size = max(1, status.bucket_size)
    yield Text()
    if status.refusals:
        yield _one_line(Text.assemble(("refused  ", "dim"), refusals(status)))
    yield _one_line(
        Text.assemble(
            ("delay, smoothed: ", "dim"),
            (f"up to {LATE}K ({LATE * size})", ON_TIME_COLOUR),
            ("  ", "dim"),
            (f"up to {VERY_LATE}K ({VERY_LATE * size})", LATE_COLOUR),
            ("  ", "dim"),
            ("above", VERY_LATE_COLOUR),
            ("  compute, ticket: for the last update; heard, pushed: time since", "dim"),
        )
    )


_QUIT = "q"


def watch(settings: TopSettings) -> int:
    """Show the server until the user has seen enough; where there is no screen, once. Returns the exit code."""
    leave_on_signals()  # SIGTERM too, or the terminal would be left as it is now
    console = Console(highlight=False)
    screen = sys.stdout.isatty() and not console.is_dumb_terminal
    try:
        with asker(settings.server, settings.timeout_seconds, settings.credentials()) as server:
            if screen and not settings.once:
                _live(console, server, settings)
                return 0
            return _once(server, settings, console if screen else Console(width=WIDE, highlight=False))
    except KeyboardInterrupt:
        return 0


def _once(server: Asker, settings: TopSettings, console: Console) -> int:
    history = History()
    try:
        history.add(server.ask())
        time.sleep(settings.every_seconds)  # two answers make a rate
        history.add(server.ask())
    except NoAnswerError as error:
        sys.stderr.write(no_answer("ormo-server top", settings.server, error))
        return 1
    console.print(View(settings.server, history, settings.sort))
    return 0


def _live(console: Console, server: Asker, settings: TopSettings) -> None:
    history, answered = History(), time.monotonic()
    place = settings.server + through_proxy(settings.server, os.environ)
    with single_keys(), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            leave_if_asked()
            due, trouble = time.monotonic() + settings.every_seconds, ""
            try:
                history.add(server.ask())
                answered = time.monotonic()
            except NoAnswerError as error:
                silent = duration(time.monotonic() - answered)
                what = f"{place} has refused" if isinstance(error, RefusedError) else f"no answer from {place}"
                trouble = f"{what} for {silent}, trying again: {error}"
            view = View(settings.server, history, settings.sort, console.height, trouble)
            live.update(view, refresh=True)
            if pressed(_QUIT, due - time.monotonic()):
                return
