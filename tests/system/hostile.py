"""Traffic that means harm, or is broken: what any port on a network gets."""

import contextlib
import itertools
import random
import socket
import threading
from collections.abc import Callable, Iterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
KINDS = (
    "random bytes",
    "random frames",
    "a call cut short",
    "a call with bytes changed",
    "a frame that is too long",
    "a message that is too long",
    "headers without end",
)
_SETTINGS, _HEADERS, _DATA = 4, 1, 0
_SLOW_SECONDS = 1.0


def frame(kind: int, flags: int, stream: int, body: bytes, length: int | None = None) -> bytes:
    """An HTTP/2 frame (RFC 9113, section 4.1); its length may be a lie."""
    size = len(body) if length is None else length
    return size.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


@contextlib.contextmanager
def overheard(address: str) -> Iterator[tuple[str, bytearray]]:
    """An address that leads to this one, and the bytes that the first client sends through it."""
    host, _, port = address.rpartition(":")
    said = bytearray()

    def pump(source: socket.socket, target: socket.socket, note: Callable[[bytes], object]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                note(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve(listener: socket.socket) -> None:
        near, _ = listener.accept()
        with near, socket.create_connection((host, int(port))) as far:
            back = threading.Thread(target=pump, args=(far, near, len))
            back.start()
            pump(near, far, said.extend)
            back.join()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", said
        thread.join(10)


class Hostile:
    """Opens connections to an address, one after the other and some at once, and sends what no client would.

    Args:
        address: of the server.
        heard: what a client sent once; empty for none.
        seed: of the choices.
        slow: connections that send one byte a second, all the time.

    Attributes:
        connections: how many were made, by kind.
    """

    def __init__(self, address: str, heard: bytes, seed: int, slow: int = 8) -> None:
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._heard = heard
        self._dice = random.Random(seed)
        self._over = threading.Event()
        self.connections: dict[str, int] = {}
        self._threads = [threading.Thread(target=self._attack)]
        self._threads += [threading.Thread(target=self._trickle, args=(number,)) for number in range(slow)]

    def __enter__(self) -> "Hostile":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(10)

    def _attack(self) -> None:
        makers = (self._random, self._frames, self._cut, self._changed, self._oversized, self._long, self._headers)
        made = dict(zip(KINDS, makers, strict=True))
        turn = itertools.cycle(KINDS)
        while not self._over.is_set():
            name = next(turn)
            self._send(made[name]())
            self.connections[name] = self.connections.get(name, 0) + 1

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(OSError), socket.create_connection(self._target, timeout=5) as peer:
            peer.sendall(data)
            peer.settimeout(0.02)
            peer.recv(1 << 12)  # for a moment: some are sent away, some would wait for ever

    def _trickle(self, number: int) -> None:
        data = (PREFACE + frame(_SETTINGS, 0, 0, b"") + self._heard) if number % 2 else bytes(1000)
        while not self._over.is_set():
            with contextlib.suppress(OSError), socket.create_connection(self._target, timeout=5) as peer:
                for at in range(len(data)):
                    if self._over.wait(_SLOW_SECONDS):
                        return
                    peer.sendall(data[at : at + 1])

    def _bytes(self, most: int) -> bytes:
        return self._dice.randbytes(self._dice.randrange(1, most))

    def _random(self) -> bytes:
        return self._bytes(4096)

    def _frames(self) -> bytes:
        number = self._dice.randrange
        frames = (frame(number(12), number(256), number(8), self._bytes(200)) for _ in range(20))
        return PREFACE + frame(_SETTINGS, 0, 0, b"") + b"".join(frames)

    def _cut(self) -> bytes:
        return self._heard[: self._dice.randrange(1, len(self._heard))]

    def _changed(self) -> bytes:
        made = bytearray(self._heard)
        for _ in range(self._dice.randrange(1, 6)):
            made[self._dice.randrange(len(PREFACE), len(made))] = self._dice.randrange(256)
        return bytes(made)

    def _oversized(self) -> bytes:
        return PREFACE + frame(_SETTINGS, 0, 0, b"") + frame(_DATA, 0, 1, self._bytes(1 << 16), (1 << 24) - 1)

    def _long(self) -> bytes:
        # The headers of a call as it was heard, and then a message that says that it has 4 GiB.
        return self._heard[: len(self._heard) // 2] + frame(_DATA, 0, 1, b"\x00\xff\xff\xff\xff" + self._bytes(1 << 14))

    def _headers(self) -> bytes:
        more = b"".join(frame(_HEADERS, 0, 1, self._bytes(1 << 14)) for _ in range(20))
        return PREFACE + frame(_SETTINGS, 0, 0, b"") + more
