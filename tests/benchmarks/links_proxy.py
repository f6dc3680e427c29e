"""A TCP proxy that is a link: so many bytes a second, and so long on the way.

For machines whose kernel can't shape traffic. Each direction is one queue that all connections share; nothing is lost,
and TCP's slow start is not felt, as on a connection that is long open.
"""

import contextlib
import multiprocessing
import queue
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

# Half a millisecond at 1 Gbit/s: that finely the bytes are spread over time.
_PIECE_BYTES = 1 << 16
# What waits in front of the link; the rest stays with the sender.
_BACKLOG_SECONDS = 0.004


class Direction:
    """One way of the link.

    Args:
        bytes_per_second: that it carries.
        delay_seconds: that each byte is on the way.
    """

    def __init__(self, bytes_per_second: float, delay_seconds: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._delay_seconds = delay_seconds
        self._free_at = 0.0
        self._lock = threading.Lock()

    def carry(self, size: int) -> float:
        """Put bytes on the link; returns when the last of them arrives, by `time.monotonic`."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + size / self._bytes_per_second
            free_at = self._free_at
        _sleep_until(free_at - _BACKLOG_SECONDS)
        return free_at + self._delay_seconds


def _sleep_until(moment: float) -> None:
    seconds = moment - time.monotonic()
    if seconds > 0:
        time.sleep(seconds)


def _pump(source: socket.socket, target: socket.socket, direction: Direction) -> None:
    """Carry what comes from one socket to the other until it ends."""
    on_the_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
    threading.Thread(target=_arrive, args=(on_the_way, target), daemon=True).start()
    with contextlib.suppress(OSError):
        while piece := source.recv(_PIECE_BYTES):
            on_the_way.put((direction.carry(len(piece)), piece))
    on_the_way.put((0.0, b""))


def _arrive(on_the_way: "queue.SimpleQueue[tuple[float, bytes]]", target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            moment, piece = on_the_way.get()
            if not piece:
                target.shutdown(socket.SHUT_WR)
                return
            _sleep_until(moment)
            target.sendall(piece)


def _serve(ready: Connection, target: tuple[str, int], bytes_per_second: float, delay_seconds: float) -> None:
    there, back = (Direction(bytes_per_second, delay_seconds) for _ in range(2))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready.send(listener.getsockname()[1])
        while True:
            near, _ = listener.accept()
            far = socket.create_connection(target)
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_pump, args=(near, far, there), daemon=True).start()
            threading.Thread(target=_pump, args=(far, near, back), daemon=True).start()


@contextlib.contextmanager
def linked(address: str, *, megabits_per_second: float, round_trip_ms: float = 0.0) -> Iterator[str]:
    """The address of what is at `address`, at the other end of such a link; in a process of its own."""
    host, _, port = address.rpartition(":")
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, (host, int(port)), megabits_per_second * 1e6 / 8, round_trip_ms / 2000)
    process = context.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    try:
        yield f"127.0.0.1:{receiver.recv()}"
    finally:
        process.terminate()
        process.join()
        for end in (receiver, sender):
            end.close()
