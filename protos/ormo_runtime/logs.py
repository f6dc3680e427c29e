"""A program's log on stderr: lines for people, or one JSON object per line for what collects logs.

A record names what it is about through `extra`, in the same words everywhere:

    log.info("worker %s left", worker, extra=Fields(worker=worker))

JSON shows these fields. Text leaves them out: the message says what matters of them.

Sentences may have come from another host. In text what is not printable becomes an escape, as JSON does by itself: a
record is one line, and no terminal is told to do anything.
"""

import contextlib
import functools
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, TypedDict

from pythonjsonlogger.json import JsonFormatter
from typing_extensions import override

from ormo_runtime.process import patient

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname)-7s %(message)s"
# Python's names for a record's parts, and ours; those with a default come first, in this order.
_PARTS = {"asctime": "time", "levelname": "level", "name": "logger", "message": "message"}
_PARTS_OF_FAILURES = {"exc_info": "exception", "stack_info": "stack"}

_LIMITED = ("grpc", "ormo_server.refused", "ormo_server.denied", "ormo_server.bad_gradients", "ormo_server.failed")


class Fields(TypedDict, total=False):
    """What a record may be about. Random numbers of 64 bits are 16 hexadecimal digits: JSON readers would round them.

    Attributes:
        worker: its id.
        rank: of one of a worker's processes; not that of the worker in the run.
        incarnation: which process of that id, in hexadecimal.
        slot, request: of the exchange.
        ticket: its number.
        epoch: of the server, in hexadecimal.
        iteration: gradients applied so far.
        samples: in the gradient, or in the run so far.
        delay, lag_buckets, step_size: of an applied gradient.
        loss: as reported.
        accuracy: as evaluated, 0 to 1.
        seconds: that the thing took.
        reason: of a refusal, as in `ormo_protos.refusals`.
        path: of a file.
        peer: the address that a call came from.
        caller: name of the caller.
        action: of an operator.
    """

    worker: str
    rank: int
    incarnation: str
    slot: int
    request: int
    ticket: int
    epoch: str
    iteration: int
    samples: int
    delay: int
    lag_buckets: int
    step_size: float
    loss: float | None
    accuracy: float
    seconds: float
    reason: str
    path: str
    peer: str
    caller: str
    action: str


def printable(text: object) -> str:
    """The text with escapes for what moves a cursor, colours, hides, or changes the direction of writing."""
    written = str(text)
    if written.isprintable():
        return written
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in written)


def set_up(level: str, form: LogFormat, about: Fields | None = None) -> None:
    """Send the log to stderr; if logging was set up before, it stays as it is.

    In JSON, warnings and uncaught exceptions become records as well, so that no line is anything else. Lines of one
    kind are limited: anyone who can reach the port can cause thousands a second. A full or closed stderr stops nothing.

    Args:
        level: the least important level shown.
        form: how lines look.
        about: fields of every record, such as the worker that the process is.
    """
    lines = formatter(form, about)
    handler = logging.StreamHandler(patient(sys.stderr, functools.partial(_apology, lines)))
    handler.setFormatter(lines)
    for limit in (*map(FewOf, _LIMITED), FewOfEach()):
        handler.addFilter(limit)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if form == "json":
        logging.captureWarnings(capture=True)
        sys.excepthook = _log_uncaught
        threading.excepthook = _log_uncaught_in_thread


class FewOf(logging.Filter):
    """Lets a few records of a library through in each period, and says how many it left out.

    Args:
        name: of the library's loggers.
        count: how many in a period.
        seconds: length of the period.
    """

    def __init__(self, name: str, count: int = 5, seconds: float = 10.0) -> None:
        super().__init__(name)
        self._count, self._seconds = count, seconds
        self._began, self._seen = float("-inf"), 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        if not super().filter(record):
            return True  # another's
        if record.created >= self._began + self._seconds:
            left_out = max(0, self._seen - self._count)
            self._began, self._seen = record.created, 0
            if left_out:
                record.msg = f"{record.getMessage()} ({left_out} more lines like this before it were left out)"
                record.args = ()
        self._seen += 1
        return self._seen <= self._count


class FewOfEach(logging.Filter):
    """Lets a limited number of records of each line of code through in each period, so that none fills a disk.

    Debug records always pass: anyone who asks for them wants all of them.

    Args:
        count: how many in a period.
        seconds: length of the period.
    """

    def __init__(self, count: int = 50, seconds: float = 10.0) -> None:
        super().__init__()
        self._count, self._seconds = count, seconds
        self._of: dict[tuple[str, int], FewOf] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        if record.levelno <= logging.DEBUG:
            return True
        few = self._of.setdefault((record.pathname, record.lineno), FewOf("", self._count, self._seconds))
        return few.filter(record)


def formatter(form: LogFormat, about: Fields | None = None) -> logging.Formatter:
    """What makes lines of records."""
    return _JsonLines(about or Fields()) if form == "json" else _TextLines(_TEXT)


def _apology(lines: logging.Formatter, left_out: int) -> str:
    return _warning(lines, __name__, f"stderr was blocked: {left_out} lines were left out")


def _warning(lines: logging.Formatter, name: str, sentence: str) -> str:
    said = {"name": name, "levelno": logging.WARNING, "levelname": "WARNING", "msg": sentence}
    return f"{lines.format(logging.makeLogRecord(said))}\n"


def announce(what: str, facts: Mapping[str, object], form: LogFormat) -> None:
    """Write a line to stdout that programs read: `what name=value ...`, or in JSON a record with these fields.

    Text has four decimals of a real number, JSON all, and `null` for NaN.
    """
    if form == "json":
        said = {"name": what, "levelno": logging.INFO, "levelname": "INFO", "msg": what, **facts}
        line = formatter(form).format(logging.makeLogRecord(said))
    else:
        written = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in facts.items()}
        line = " ".join([what, *(f"{name}={value}" for name, value in written.items())])
    patient(sys.stdout).write(f"{line}\n")


def announced(line: str) -> dict[str, str]:
    """The facts of a line that `announce` wrote, in either form; none of any other line."""
    if line.startswith("{"):
        with contextlib.suppress(ValueError):
            facts = {name: value for name, value in json.loads(line).items() if name not in _PARTS.values()}
            return {name: "nan" if value is None else str(value) for name, value in facts.items()}
    return {name: value for name, equals, value in (word.partition("=") for word in line.split()[1:]) if equals}


def first_words(program: str, sentence: str, form: LogFormat) -> None:
    """Warn before the log is set up, in its form: a plain sentence, or in JSON a record like any other."""
    plain = f"{program}: {printable(sentence)}\n"
    patient(sys.stderr).write(_warning(formatter(form), program, sentence) if form == "json" else plain)


def last_words(program: str, error: object, form: LogFormat) -> None:
    """Say why a program ends: a plain sentence, or in JSON a record like any other."""
    if form == "json":
        logging.getLogger(program).error("%s", error)
    else:
        patient(sys.stderr).write(f"{program}: {printable(error)}\n")


class _TextLines(logging.Formatter):
    """A line for each record, and what belongs to it indented: nothing that was sent to us looks like a record."""

    @override
    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    @override
    def formatException(self, ei: Any) -> str:
        return _indent(super().formatException(ei))

    @override
    def formatStack(self, stack_info: str) -> str:
        return _indent(super().formatStack(stack_info))


def _indent(lines: str) -> str:
    return "\n".join(f"  {printable(line)}" for line in lines.split("\n"))


class _JsonLines(JsonFormatter):
    """JSON with times by RFC 3339 and with `null` for NaN and infinity, which JSON does not have."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, about: Fields) -> None:
        super().__init__(list(_PARTS), rename_fields=_PARTS | _PARTS_OF_FAILURES, defaults=dict(about))

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in log_data.items()
        }
        return finite | {"level": str(log_data["level"]).lower()}  # as `--log-level` has it


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger(__name__).critical("uncaught %s: %s", kind.__name__, error, exc_info=(kind, error, trace))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
