"""Numbers that callers give: Python's, NumPy's, or a tensor's only element."""

import numbers
from typing import Any

from torch import Tensor

from ormo_runtime.settings import LONGEST_SECONDS, checked_address
from ormo_worker.errors import OptionRefused


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


def described(value: Any) -> str:
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
        raise OptionRefused(f"{name} is {described(value)}: expected a whole number from {least} to {most}")
    return number


def real_number(name: str, value: Any) -> float:
    """The number, as `one_number` takes it.

    Raises:
        OptionRefused: it is none.
    """
    number = one_number(plain(value))
    if number is None:
        raise OptionRefused(f"{name} is {described(value)}: expected one real number")
    return float(number)


def positive_seconds(name: str, value: Any, most: float = LONGEST_SECONDS) -> float:
    """A time to wait: above 0, and no longer than Python can.

    Raises:
        OptionRefused: it is none.
    """
    number = plain(value)
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number <= most:
        raise OptionRefused(f"{name} is {described(value)}: expected seconds, above 0 and up to {most:g}")
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
