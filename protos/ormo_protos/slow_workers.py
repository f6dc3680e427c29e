"""`2:10x`: how the command lines say which workers are slower than the others."""

import re

_PART = re.compile(r"(\d+):(\d+(?:\.\d+)?)x")


def slow_factors(text: str, workers: int) -> list[float]:
    """How many times as long each worker takes for a gradient: 1 for most, the slow ones last.

    Args:
        text: COUNT:FACTORx, or several separated by commas; empty for none.
        workers: how many there are.

    Raises:
        ValueError: the text has another form, a factor below 1, or more slow workers than there are.
    """
    slow: list[float] = []
    for part in filter(None, text.split(",")):
        match = _PART.fullmatch(part.strip())
        if match is None or float(match[2]) < 1:
            raise ValueError(f"{part!r} came, expected COUNT:FACTORx with a factor of at least 1, such as 1:10x")
        slow += [float(match[2])] * int(match[1])
    if len(slow) > workers:
        raise ValueError(f"{text} makes {len(slow)} workers slower, but there are only {workers}")
    return [1.0] * (workers - len(slow)) + slow
