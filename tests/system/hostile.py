"""Traffic that means harm, or is broken: what any port on a network gets."""

import contextlib
import itertools
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ormo_protos.v1 import parameter_server_pb2 as pb

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# HTTP/2's frames and flags (RFC 9113, section 6).
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
_INITIAL_WINDOW_SIZE, _CANCEL = 4, 8

# Each time the server begins as many calls as a connection may have. Measured on two cores beside training: at 1,300 in
# a second the calls of everybody wait for two seconds, and gRPC cancels some; this keeps them below 200.
_COSTLY, _COSTLY_ONE_IN = "calls that are reset at once", 8
_PER_SECOND = 500  # connections at most of those who do not wait: the machine is the trainer's, too
_QUIET_SECONDS = 0.25  # of a server that is asked to do all this beside its work
_SLOW_SECONDS = 1.0
_SLOW_PIECES = 20


class Frame(NamedTuple):
    """One frame as it was sent."""

    kind: int
    flags: int
    stream: int
    body: bytes


def frame(kind: int, flags: int, stream: int, body: bytes = b"", length: int | None = None) -> bytes:
    """An HTTP/2 frame (RFC 9113, section 4.1); its length may be a lie."""
    size = len(body) if length is None else length
    return size.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


def frames(said: bytes) -> Iterator[Frame]:
    """The whole frames in what a server said, or a client without its preface."""
    while len(said) >= 9 and len(said) >= (end := 9 + int.from_bytes(said[:3], "big")):
        yield Frame(said[3], said[4], int.from_bytes(said[5:9], "big") & (2**31 - 1), said[9:end])
        said = said[end:]


def before_data(heard: bytes) -> bytes:
    """What a client said before the first frame of data."""
    kept = PREFACE
    for one in frames(heard[len(PREFACE) :]):
        if one.kind == DATA:
            return kept
        kept += frame(*one)
    raise ValueError("the client has sent no data")


def fields(**named: str) -> bytes:
    """A block of header fields, none of them compressed (RFC 7541, section 6.2.2)."""
    texts = [(name.replace("_", "-").replace("pseudo-", ":").encode(), value.encode()) for name, value in named.items()]
    return b"".join(b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in texts)


def heading(method: str) -> bytes:
    """The header fields of a call; a method of another service is named with it."""
    path, grpc = "/ormo.v1.ParameterServer/" * ("/" not in method) + method, "application/grpc"
    pseudo = fields(pseudo_method="POST", pseudo_scheme="http", pseudo_path=path, pseudo_authority="hostile")
    return pseudo + fields(te="trailers", content_type=grpc)


def greeting(window: int | None = None) -> bytes:
    """A preface with settings."""
    setting = b"" if window is None else _INITIAL_WINDOW_SIZE.to_bytes(2, "big") + window.to_bytes(4, "big")
    return PREFACE + frame(SETTINGS, 0, 0, setting)


def opening(method: str, window: int | None = None) -> bytes:
    """All of a call that comes before its message."""
    return greeting(window) + frame(HEADERS, END_HEADERS, 1, heading(method))


def message(content: bytes) -> bytes:
    """A message of a call, as gRPC frames it."""
    return b"\x00" + len(content).to_bytes(4, "big") + content


def told(answer: bytes, *, closed: bool = False) -> str:
    """What a server said, in words, each of them once."""
    words = dict.fromkeys(filter(None, map(_word, frames(answer))))
    return ", ".join([*words, *["closed"] * closed]) or "nothing"


def _word(one: Frame) -> str:
    match one.kind:
        case 0 if one.body:
            return "DATA"
        case 1 if (at := one.body.find(b"grpc-status")) >= 0:
            return f"status {one.body[at + 12 :][: one.body[at + 11]].decode()}"
        case 3:
            return f"RST_STREAM {int.from_bytes(one.body, 'big')}"
        case 4 | 6 if one.flags & ACK:
            return "SETTINGS acknowledged" if one.kind == SETTINGS else "PING answered"
        case 7:
            return f"GOAWAY {int.from_bytes(one.body[4:8], 'big')}"
    return ""


# What is sent at once.


def _bytes(dice: random.Random, most: int) -> bytes:
    return dice.randbytes(dice.randrange(1, most))


def _random(dice: random.Random, heard: bytes) -> bytes:
    return _bytes(dice, 4096)


def _random_after_a_greeting(dice: random.Random, heard: bytes) -> bytes:
    return greeting() + _bytes(dice, 4096)


def _frames(dice: random.Random, heard: bytes) -> bytes:
    number = dice.randrange
    return greeting() + b"".join(frame(number(12), number(256), number(8), _bytes(dice, 200)) for _ in range(20))


def _cut(dice: random.Random, heard: bytes) -> bytes:
    return heard[: dice.randrange(1, len(heard))]


def _changed(dice: random.Random, heard: bytes) -> bytes:
    made = bytearray(heard)
    for _ in range(dice.randrange(1, 6)):
        made[dice.randrange(len(PREFACE), len(made))] = dice.randrange(256)
    return bytes(made)


def _long_frame(dice: random.Random, heard: bytes) -> bytes:
    # Few enough bytes for a frame that is allowed: what is wrong is the length that it says.
    return greeting() + frame(DATA, 0, 1, _bytes(dice, 1 << 13), (1 << 24) - 1)


def _long_message(dice: random.Random, heard: bytes) -> bytes:
    # The headers of a call as it was heard, and then a message that says that it has 4 GiB, in frames that are allowed.
    return before_data(heard) + frame(DATA, 0, 1, b"\x00\xff\xff\xff\xff" + _bytes(dice, 1 << 13))


def _headers(dice: random.Random, heard: bytes) -> bytes:
    more = [frame(CONTINUATION, 0, 1, fields(x=60 * "a") * dice.randrange(1, 200)) for _ in range(20)]
    return greeting() + frame(HEADERS, 0, 1, heading("GetStatus")) + b"".join(more)


def _resets(dice: random.Random, heard: bytes) -> bytes:
    # Of each stream all that a server needs to begin the call, and at once its end.
    block, cancel = heading("GetStatus"), _CANCEL.to_bytes(4, "big")
    streams = range(1, 2 * dice.randrange(50, 200), 2)
    return greeting() + b"".join(
        frame(HEADERS, END_HEADERS, stream, block) + frame(RST_STREAM, 0, stream, cancel) for stream in streams
    )


def _pings(dice: random.Random, heard: bytes) -> bytes:
    return greeting() + (frame(SETTINGS, 0, 0) + frame(PING, 0, 0, dice.randbytes(8))) * dice.randrange(50, 500)


AT_ONCE: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "random bytes": _random,
    "random bytes after a greeting": _random_after_a_greeting,
    "random frames": _frames,
    "a call cut short": _cut,
    "a call with bytes changed": _changed,
    "a frame that is too long": _long_frame,
    "a message that is too long": _long_message,
    "headers without end": _headers,
    _COSTLY: _resets,
    "a flood of settings and pings": _pings,
}


# What comes in pieces, one a second.


def _slow_request(heard: bytes) -> Iterator[bytes]:
    return _slow_message("GetStatus")


def _slow_stream(heard: bytes) -> Iterator[bytes]:
    return _slow_message("PushPull")


def _slow_message(method: str) -> Iterator[bytes]:
    yield opening(method)
    for byte in message(bytes(100)):
        yield frame(DATA, 0, 1, bytes([byte]))


def _slow_from_the_first_byte(heard: bytes) -> Iterator[bytes]:
    yield from (heard[at : at + 1] for at in range(len(heard)))


def _no_window(heard: bytes) -> Iterator[bytes]:
    # A whole call, and no room for its answer; then signs of life, whose answers nobody reads.
    request = pb.PullParamsRequest(delivery=pb.DeliveryRequest(dtype=pb.DTYPE_FLOAT32)).SerializeToString()
    yield opening("PullParams", window=0) + frame(DATA, END_STREAM, 1, message(request))
    yield from itertools.repeat(frame(PING, 0, 0, bytes(8)))


SLOWLY: dict[str, Callable[[bytes], Iterator[bytes]]] = {
    "a request that comes slowly": _slow_request,
    "a stream that comes slowly": _slow_stream,
    "a call that is slow from its first byte": _slow_from_the_first_byte,
    "a window of 0": _no_window,
}
KINDS = (*AT_ONCE, *SLOWLY)


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


def answer_of(peer: socket.socket, quiet_seconds: float, *until: str) -> str:
    """What is told until all these words are, nothing comes for so long, or the peer has closed."""
    answer = b""
    peer.settimeout(quiet_seconds)
    try:
        while data := peer.recv(1 << 16):
            answer += data
            if until and all(words in told(answer) for words in until):
                return told(answer)
    except TimeoutError:
        return told(answer)
    except ConnectionError:
        pass
    return told(answer, closed=True)


class Hostile:
    """Opens connections to an address, many of them at once, and sends what no client would.

    Who has sent all that it wants to leaves at once, or waits for the answer: there is one of each, who do all that
    there is in turn. Besides, there are those who send slowly.

    Args:
        address: of the server.
        heard: what a client sent once.
        seed: of the choices.
        slow: how many at once of each kind that comes in pieces.

    Attributes:
        connections: how many were made and sent what they should, or its first piece, by kind.
        answers: what the server told those that waited, by kind.
    """

    def __init__(self, address: str, heard: bytes, seed: int, slow: int = 2) -> None:
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._heard = heard
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.connections: Counter[str] = Counter()
        self.answers: dict[str, Counter[str]] = {name: Counter() for name in KINDS}
        self._threads = [
            threading.Thread(target=self._attack, args=(random.Random(seed + waits), waits)) for waits in (False, True)
        ]
        self._threads += [threading.Thread(target=self._hold, args=(name,)) for name in SLOWLY for _ in range(slow)]

    def __enter__(self) -> "Hostile":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(10)

    def _attack(self, dice: random.Random, waits: bool) -> None:
        for name, make in itertools.cycle(AT_ONCE.items()):
            if name == _COSTLY and not waits and dice.randrange(_COSTLY_ONE_IN):
                continue
            with contextlib.suppress(OSError), self._connect() as peer:
                peer.sendall(make(dice, self._heard))
                self._count(name)
                if waits:
                    self.answers[name][answer_of(peer, _QUIET_SECONDS)] += 1
            if self._over.wait(1 / _PER_SECOND):
                return

    def _hold(self, name: str) -> None:
        while not self._over.is_set():
            with contextlib.suppress(OSError), self._connect() as peer:
                self._send_slowly(name, peer)
                answer = answer_of(peer, _QUIET_SECONDS)
                with self._lock:
                    self.answers[name][answer] += 1
            self._over.wait(_SLOW_SECONDS)

    def _send_slowly(self, name: str, peer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for number, piece in enumerate(itertools.islice(SLOWLY[name](self._heard), _SLOW_PIECES)):
                peer.sendall(piece)
                if number == 0:
                    self._count(name)
                if self._over.wait(_SLOW_SECONDS):
                    return

    def _connect(self) -> socket.socket:
        return socket.create_connection(self._target, timeout=5)

    def _count(self, name: str) -> None:
        with self._lock:
            self.connections[name] += 1
