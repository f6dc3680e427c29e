"""The process that a program is: its standard streams, its memory, its threads, and the signals that end it.

Standard streams may be closed, full, or a pipe that nobody reads. By default glibc gives every large block back to the
system when it is freed, and the next message of that size is faulted in again, page by page: measured, that is four
fifths of the time of a plain gRPC server that moves tensors.
"""

# `signal` without its enums, which take 20 µs of each step.
import _signal  # type: ignore[import-not-found]
import atexit
import codecs
import contextlib
import ctypes
import functools
import io
import logging
import os
import platform
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import NoReturn, ParamSpec, Protocol, TextIO, TypeVar

_LOG = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

# Images of web services set it. prometheus_client would keep our values in files of that folder, where they outlive us,
# and find no folder where only the variable was inherited.
SHARED_VALUES = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")
# What our own texts have beside ASCII; in what others have said, an escape tells more than a question mark.
_SPELLED = {"–": "-", "…": "...", "·": "*", "×": "x", "β": "beta", "η": "eta", "λ": "lambda", "τ": "tau"}
_SPELLED |= {"ε": "epsilon", "₁": "1", "₂": "2"}


def prepare_process() -> None:
    """Let stdout and stderr take every text in whatever encoding they have, and keep metrics and gRPC's lines out.

    Comes before prometheus_client and gRPC are imported, which look once.
    """
    open_standard_streams()
    codecs.register_error("spelled", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else it was replaced, as in a notebook
            stream.reconfigure(errors="spelled")
    for variable in SHARED_VALUES:
        os.environ.pop(variable, None)
    # gRPC's core writes lines of its own, past `logging`: one for each stranger who fails a handshake.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def end_with(main: Callable[[], int]) -> NoReturn:
    """Run a program, and end the process with its code, without taking its objects apart.

    Python's own end takes PyTorch's modules apart, object by object: half a second of processor time, which are ten
    seconds where others want it, too, and then whoever stops a worker kills it. Functions that libraries have
    registered for the end are called; what was not caught is shown, and ends the process, as ever.
    """
    codes: list[int] = []
    atexit.register(_end_now, codes)  # before any library registers its own: the first is called last
    codes.append(main())
    sys.exit(codes[0])


def _end_now(codes: list[int]) -> None:
    if not codes:
        return
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # no reader any more, or closed
            stream.flush()
    os._exit(codes[0])


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Spell what an encoding lacks in ASCII; a handler for `codecs.register_error`."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    return "".join(_SPELLED.get(letter, ascii(letter)[1:-1]) for letter in letters), error.end


# How long to wait for a slow reader, once: the thread that logs may hold a lock that all others need.
_PATIENCE_SECONDS = 1.0
# What a pipe takes whole, or not at all, once `poll` says that it takes something.
_PIECE_BYTES = select.PIPE_BUF
_APOLOGY = "({} lines were left out)\n".format


class PatientStream:
    """Writes to a descriptor what it takes, and leaves the rest out instead of waiting or failing.

    Made for a `logging.StreamHandler`, which writes one line at a time.

    Args:
        descriptor: to write to.
        apology: makes a line, to go before the first one after a gap, of how many were left out.
        encoding: of lines; what it lacks is written as escapes.
    """

    def __init__(self, descriptor: int, apology: Callable[[int], str] = _APOLOGY, encoding: str = "utf-8") -> None:
        self._descriptor = descriptor
        self._encoding = encoding
        self._apology = apology
        self._left_out = 0
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def write(self, line: str) -> None:
        """Write a line that has its end, or leave it out; a long one may be cut."""
        if self._left_out:
            line = f"\n{self._apology(self._left_out)}{line}"  # what came before may have been cut
        try:
            taken = self._taken(line.encode(self._encoding, errors="backslashreplace"))
        except OSError:  # no room, no reader, or closed
            taken = False
        self._left_out = 0 if taken else self._left_out + 1

    def _taken(self, data: bytes) -> bool:
        while data:
            # After a line that was left out nothing is waited for: each would cost as long.
            if not self._poll.poll(0 if self._left_out else 1000 * _PATIENCE_SECONDS):
                return False
            data = data[os.write(self._descriptor, data[:_PIECE_BYTES]) :]
        return True

    def flush(self) -> None:
        """Nothing is held back."""


def patient(stream: TextIO, apology: Callable[[int], str] = _APOLOGY) -> PatientStream | TextIO:
    """What writes where the stream does; the stream itself if that is no descriptor, as in a notebook."""
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:
        return stream
    return PatientStream(descriptor, apology, stream.encoding)


def open_standard_streams() -> None:
    """Let a program that was started without stdin, stdout or stderr have empty ones.

    Else its next three files come to be in their place, and lines that are meant for people are written into them.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8")  # noqa: SIM115 - until the program ends
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8")  # noqa: SIM115


# From glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Have this process keep freed memory for its next use; call it at a program's start, before it has threads.

    Memory never goes back to the system then: the process keeps the size of its peak. With one arena that peak is half
    of what it is with one per thread.

    Returns:
        Whether it was done; False where the C library is another than glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        _LOG.info("freed memory goes back to the system: the allocator of this C library has no setting to keep it")
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20), (_ARENA_MAX, 1))
    refused = [option for option, value in wanted if mallopt(option, value) != 1]
    if refused:
        _LOG.warning("the allocator refused its settings %s: messages may be slower", refused)
    else:
        _LOG.info("freed memory is kept for the next use")
    return not refused


class StartedPool(ThreadPoolExecutor):
    """A fixed number of threads, which start with the pool.

    By default a pool starts a thread when it is first needed. If the system has none left by then, `submit` fails in
    the caller's thread: gRPC's serving thread would end, and with it the serving.

    Args:
        count: of threads.
        name: what theirs begin with.
        prepare: is called by each at its start.

    Raises:
        RuntimeError: the system has too few left; none of ours is left running.
    """

    def __init__(self, count: int, name: str, prepare: Callable[[], object] | None = None) -> None:
        super().__init__(count, thread_name_prefix=name, initializer=prepare)
        begin = threading.Event()
        try:
            for _ in range(count):
                self.submit(begin.wait)  # keeps its thread busy, so that the next one gets another
        except RuntimeError:
            begin.set()
            self.shutdown()
            raise
        begin.set()


# SIGTERM and SIGINT as an exception that can't get lost, and does no harm where it is raised.
#
# Python raises `KeyboardInterrupt` wherever the main thread happens to be. Where that is a finalizer, or a callback of
# a library, it is reported and forgotten, and the program would go on. Where gRPC, or a lock, has just been taken it is
# never given back, and whoever needs it next waits for ever. There it is not raised: what the main thread waits for is
# ended instead, by another thread, so that it comes to a place where it may be.
#
# Where the main thread is can be told from its stack alone. The simpler way, to raise nothing at the first signal and
# have our loops look, would leave a stop unheeded while a task loads its data or sleeps: these have no loop of ours.
# It is right for a function that has: `interrupted_safely`.


_SECONDS_BETWEEN_CALLS = 0.5

_asked = threading.Event()


class Waited(Protocol):
    """What the main thread may wait for."""

    def end_waits(self) -> None:
        """Have the main thread wait no more, and then look; from any thread."""


_waited: "weakref.WeakSet[Waited]" = weakref.WeakSet()


def leave_on_signals() -> None:
    """From now on both signals raise `KeyboardInterrupt`, the second one in any case."""
    _asked.clear()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)


def end_on_signals(waited: Waited) -> None:
    """End its waits when a signal has come, for as long as it is there."""
    _waited.add(waited)


def leave_if_asked() -> None:
    """Raise it again, if a signal has come and was lost: for loops to call now and then.

    Raises:
        KeyboardInterrupt: a signal has come; in the main thread alone, which ends what others do.
    """
    if _asked.is_set() and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


def interrupted_safely(function: Callable[P, T]) -> Callable[P, T]:
    """Have SIGINT end this function where it looks, and not wherever it is: in programs that go on, such as notebooks.

    Where SIGINT has a handler of the program's own, or another thread than the main one calls, nothing is changed. A
    second signal is raised at once.

    Args:
        function: what it waits for was given to `end_on_signals`, and it calls `leave_if_asked` after each wait.

    Returns:
        The function; if it comes to its end without having looked, `KeyboardInterrupt` is raised there.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        if (
            threading.current_thread() is not threading.main_thread()
            or _signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        ):
            return function(*args, **kwargs)
        _asked.clear()  # a second signal may have come at the very end of the call before
        try:
            _signal.signal(signal.SIGINT, _interrupt_later)
            returned = function(*args, **kwargs)
        except KeyboardInterrupt:
            _end_interruption()
            raise
        except BaseException:
            if _end_interruption():
                raise KeyboardInterrupt from None
            raise
        if _end_interruption():
            raise KeyboardInterrupt
        return returned

    return called


def _interrupt_later(_number: int, _frame: FrameType | None) -> None:
    if _asked.is_set():
        _signal.signal(signal.SIGINT, signal.default_int_handler)  # `called` itself may be where this is raised
        raise KeyboardInterrupt
    _asked.set()
    _begin_to_end_waits()


def _end_interruption() -> bool:
    """Give SIGINT its handler back; return whether it came meanwhile."""
    _signal.signal(signal.SIGINT, signal.default_int_handler)
    asked = _asked.is_set()
    _asked.clear()
    return asked


def _interrupt(_number: int, frame: FrameType | None) -> None:
    again = _asked.is_set()
    _asked.set()
    if again or not _holds_locks(frame):
        raise KeyboardInterrupt
    _begin_to_end_waits()


def _holds_locks(frame: FrameType | None) -> bool:
    modules = []
    while frame is not None:
        modules.append(str(frame.f_globals.get("__name__")))
        frame = frame.f_back
    return modules[:1] == ["threading"] or any(name.split(".")[0] == "grpc" for name in modules)


def _begin_to_end_waits() -> None:
    threading.Thread(target=_end_waits, name="ormo-interruption", daemon=True).start()


def _end_waits() -> None:
    # Again and again: a wait may begin just after.
    while _asked.is_set():
        for each in list(_waited):
            each.end_waits()
        time.sleep(_SECONDS_BETWEEN_CALLS)
