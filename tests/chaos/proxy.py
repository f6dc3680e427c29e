"""A TCP proxy that can be made to fail: what workers reach the server through."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from enum import Enum

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Way(Enum):
    """A direction."""

    TO_SERVER = "to the server"
    TO_WORKER = "to the worker"


class Proxy:
    """Carries connections to an address, from a port of its own.

    Attributes:
        held: how often something came that was not carried on at once.
        carried: bytes each way.
    """

    def __init__(self) -> None:
        self.held = 0
        self.carried = dict.fromkeys(Way, 0)
        self._target: tuple[str, int] | None = None
        self._open = {way: threading.Event() for way in Way}
        for way in Way:
            self._open[way].set()
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def lead_to(self, address: str) -> None:
        """Where new connections go."""
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))

    def reset(self) -> int:
        """Break all connections, with a RST to both ends; returns how many."""
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        ends = [end for pair in pairs for end in pair]
        # Whoever pumps must not shut an end down meanwhile, which would say goodbye: ours are closed before he wakes.
        wakers = []
        for end in ends:
            with contextlib.suppress(OSError):  # it has just ended by itself
                wakers.append(end.dup())
            end.close()
        for waker in wakers:
            with contextlib.suppress(OSError):
                waker.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                waker.shutdown(socket.SHUT_RD)
            waker.close()
        return len(pairs)

    @contextlib.contextmanager
    def silent(self, *ways: Way) -> Iterator[None]:
        """Carry nothing these ways, and tell nobody: what comes waits, as in a network that is cut."""
        for way in ways:
            self._open[way].clear()
        try:
            yield
        finally:
            for way in ways:
                self._open[way].set()

    def close(self) -> None:
        """Stop."""
        self._listener.close()
        for way in Way:
            self._open[way].set()
        self.reset()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        try:
            assert self._target is not None
            far = socket.create_connection(self._target, timeout=5)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pair = (near, far)
        with self._lock:
            self._pairs.add(pair)
        back = threading.Thread(target=self._pump, args=(far, near, Way.TO_WORKER), daemon=True)
        back.start()
        self._pump(near, far, Way.TO_SERVER)
        back.join()
        with self._lock:
            self._pairs.discard(pair)
        near.close()
        far.close()

    def _pump(self, source: socket.socket, target: socket.socket, way: Way) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if not self._open[way].is_set():
                    self.held += 1
                    self._open[way].wait()
                self.carried[way] += len(data)
                target.sendall(data)
        for end in (source, target):  # a server that dies takes both directions with it
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
