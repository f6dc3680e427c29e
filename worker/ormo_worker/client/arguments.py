"""What callers give a client: numbers of any kind, who they are, how long they wait, and whom to tell of it."""

import numbers
import os
import re
import secrets
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ormo_protos.limits import WORKER_ID, WORKER_ID_IN_WORDS
from ormo_runtime.settings import LONGEST_SECONDS, checked_address
from ormo_worker.client.protocol import Fate
from ormo_worker.errors import OptionRefused

_HOST_CHARACTERS = 80  # so that the rest fits into 128
_LONGEST_SILENCE = 1e6  # gRPC counts milliseconds with 32 bits


def plain(value: Any) -> Any:
    """The number that a tensor or array has as its only element; whatever else comes, as it is."""
    try:
        return value.item() if hasattr(value, "item") else value
    except (RuntimeError, TypeError, ValueError):  # it has several, or none that is known
        return value


def one_number(value: Any) -> float | Tensor | None:
    """The number, NaN or infinity; a tensor's only element as it is, for it may be far away; None for all else."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        return value if value.numel() == 1 and not value.is_complex() and not value.is_meta else None
    number = plain(value)
    try:
        return float(number) if isinstance(number, numbers.Real) else None
    except OverflowError:
        return None


def describe(value: Any) -> str:
    """What came, in a few words: a tensor may be large."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    """The number, if it is whole: a mask's sum is a float, and 32.0 samples are as good as 32.

    Raises:
        OptionRefused: it is not, or is out of these bounds.
    """
    if type(value) is int and least <= value <= most:  # as nearly all are: no need to look for what else it may be
        return value
    number = plain(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
        raise OptionRefused(f"{name} is {describe(value)}: expected a whole number from {least} to {most}")
    return number


def real_number(name: str, value: Any) -> float:
    """The number, as `one_number` takes it.

    Raises:
        OptionRefused: it is none.
    """
    number = one_number(plain(value))
    if number is None:
        raise OptionRefused(f"{name} is {describe(value)}: expected one real number")
    return float(number)


def positive_seconds(name: str, value: Any, most: float = LONGEST_SECONDS) -> float:
    """A time to wait: above 0, and no longer than Python can.

    Raises:
        OptionRefused: it is none.
    """
    number = plain(value)
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number <= most:
        raise OptionRefused(f"{name} is {describe(value)}: expected seconds, above 0 and up to {most:g}")
    return float(number)


def address(name: str, value: Any, *, lowest_port: int) -> str:
    """The value, if it is HOST:PORT.

    Raises:
        OptionRefused: it is not; a scheme, as in http://, is none of it.
    """
    try:
        return checked_address(value, lowest_port=lowest_port)
    except (TypeError, ValueError) as error:
        wanted = f"expected HOST:PORT as a str, not {type(value).__name__}" if isinstance(error, TypeError) else error
        raise OptionRefused(f"{name} is {value!r}: {wanted}") from None


def default_worker_id() -> str:
    """HOSTNAME-PID-HEX: readable, and unique also where containers share host names and process ids."""
    host = re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname())[:_HOST_CHARACTERS]
    return f"{host or 'worker'}-{os.getpid()}-{secrets.token_hex(3)}"


@dataclass(frozen=True, slots=True)
class Identity:
    """A worker in its messages.

    Attributes:
        worker: 1 to 128 of the characters A-Z a-z 0-9 . _ -
        incarnation: drawn at random; a newer process with the same id has another.

    Raises:
        OptionRefused: the id has other characters, or too many.
    """

    worker: str = field(default_factory=default_worker_id)
    incarnation: int = field(default_factory=lambda: secrets.randbits(64))

    def __post_init__(self) -> None:
        if not isinstance(self.worker, str) or not re.fullmatch(WORKER_ID, self.worker):
            raise OptionRefused(f"the worker id {self.worker!r} can't be used: expected {WORKER_ID_IN_WORDS}")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for the server.

    Attributes:
        connect_timeout: seconds until the first sign of life, after which a caller's call fails.
        failure_timeout: seconds without a byte after which the connection counts as dead and is made anew.
        give_up_after: seconds without a sign of life after the first one, after which a call fails; None
            to try for ever.

    Raises:
        OptionRefused: a time that is not above 0, and at most 1e9 seconds, or 1e6 for the failure timeout.
    """

    connect_timeout: float = 60.0
    failure_timeout: float = 30.0
    give_up_after: float | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "connect_timeout", positive_seconds("connect_timeout", self.connect_timeout))
        set_(self, "failure_timeout", positive_seconds("failure_timeout", self.failure_timeout, _LONGEST_SILENCE))
        if self.give_up_after is not None:
            set_(self, "give_up_after", positive_seconds("give_up_after", self.give_up_after))


Stage = Literal["compute", "push", "wait", "pull"]


class Observer:
    """What a worker or reader tells of itself while it works; who wants to know overrides a method.

    Methods are called from any thread: a slot's, the heartbeat's, the caller's.
    """

    def note_exchange(self, stages: Iterable[tuple[Stage, float]], fate: Fate | None, local_steps: int = 0) -> None:
        """An exchange is over, or was given up.

        Args:
            stages: what took how many seconds: computing the gradient; pushing it, up to its result; waiting for the
                next parameters, up to their first byte; pulling them. Those that the exchange did not come to are left
                out, and those of an attempt that failed are in it, too.
            fate: what became of its gradient; None if it had none, or was given up before that was known.
            local_steps: how many its gradient was the sum of.
        """

    def note_wait(self, seconds: float) -> None:
        """A step has waited so long for parameters; less than its exchange took, where others are in flight."""

    def note_retry(self, cause: str) -> None:
        """A call failed and is made again.

        Args:
            cause: the server's reason, or gRPC's status code.
        """

    def note_rejoin(self) -> None:
        """The worker joined once more."""
