"""What a journal's files still show behind the place where it can be used no further."""

from collections import Counter
from collections.abc import Iterable

from ormo_server.core.inputs import Push
from ormo_server.journal.chain import End, Line, Place, parsed


class Behind:
    """Takes what is there, line by line, and tells what of it was lost.

    Args:
        used: the last line that could be used.
        marks: of what was acknowledged; see `mark`.

    Attributes:
        anything: there is more than openings of logs.
        doubled: there are lines that were used already.
    """

    def __init__(self, used: Place, marks: Iterable[Place]) -> None:
        self._used = used
        self._acknowledged = max((used, *marks))
        self._ends = {used.log: used.line}
        self._pushes: list[tuple[Place, str]] = []
        self.anything = self.doubled = False

    def add(self, log: int, number: int, raw: bytes) -> None:
        """Take what stands in a log as line `number`."""
        line = parsed(raw, number)
        if isinstance(line, End):
            self._ends[line.log] = max(self._ends.get(line.log, 0), line.lines)
            return
        self.anything = True
        if line is None:
            return
        place = Place(log, line.number)
        self.doubled |= place <= self._used
        self._ends[log] = max(self._ends.get(log, 0), line.number)
        self._acknowledged = max(self._acknowledged, self._told_by(log, line))
        if line.record.input is not None and isinstance(push := line.record.input.input, Push):
            self._pushes.append((place, push.worker))

    def _told_by(self, log: int, line: Line) -> Place:
        if line.acknowledged > 0:
            return Place(log, line.acknowledged)
        in_log_before = self._ends.get(log - 1, 0) + line.acknowledged
        return Place(log - 1, in_log_before) if in_log_before > 0 else self._used

    @property
    def lost(self) -> str:
        """What was acknowledged and can't be used, in words; empty if nothing shows that there is any."""
        used, last = self._used, self._acknowledged
        if last <= used:
            return ""
        before = sum(lines for log, lines in self._ends.items() if used.log <= log < last.log)
        count = before + last.line - used.line
        pushes = Counter(worker for place, worker in self._pushes if used < place <= last)
        among = ", ".join(f"{number:,} of {worker!r}" for worker, number in sorted(pushes.items()))
        known = f", pushes among them that can still be read: {among}" if among else ""
        return f"at least {max(count, 1):,} acknowledged entries{known}"
