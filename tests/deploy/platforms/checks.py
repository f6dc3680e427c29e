"""What is wrong with what was seen, as sentences; without any platform, so that each is known to find its fault."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

USER = 10001
LAYER_BYTES = 10e6  # of code; PyTorch's layer has nearly 1 GB
_MOST_MEMORY = 0.9  # of the limit


@dataclass(frozen=True)
class Ending:
    """How a container ended that was told to.

    Attributes:
        pod: its name.
        code: it ended with.
        expected: of a clean end on this platform.
        seconds: from the order on.
        grace_seconds: after which it would have been killed.
    """

    pod: str
    code: int
    expected: int
    seconds: float
    grace_seconds: float


def not_json(pod: str, lines: Iterable[str]) -> list[str]:
    """With JSON logs every line is a record."""
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not {"time", "level", "message"} <= set(record):
            found.append(f"{pod} wrote a line that is no record in JSON: {line!r}")
    return found


def unconfined(pod: str, facts: Mapping[str, Any]) -> list[str]:
    """By what `inside.facts` tells."""
    limit = facts["memory_limit_bytes"]
    wrong = {
        f"runs as user {facts['user']}, and {USER} was expected": facts["user"] != USER,
        f"has capabilities {facts['capabilities']:#x}": facts["capabilities"] != 0,
        "may gain rights": facts["may_gain"],
        f"can write to {', '.join(facts['writable'])}": bool(facts["writable"]),
        f"can't write to {', '.join(facts['not_writable'])}": bool(facts["not_writable"]),
        f"has no limit of memory: {limit!r}": not limit.isdecimal() or int(limit) > 1 << 50,
        f"has no limit of processes: {facts['processes_limit']!r}": not facts["processes_limit"].isdecimal(),
        f"was killed {facts['killed_for_memory']} times for its memory": facts["killed_for_memory"] > 0,
    }
    if limit.isdecimal() and facts["memory_bytes"] > _MOST_MEMORY * int(limit):
        wrong[f"has {facts['memory_bytes']:,} of {int(limit):,} bytes of memory"] = True
    return [f"{pod} {sentence}" for sentence, is_so in wrong.items() if is_so]


def unclean(endings: Sequence[Ending]) -> list[str]:
    """Whoever is told to end does so in time, and with the code that says that it did."""
    found = [
        f"{it.pod} ended with {it.code}, and {it.expected} was expected" for it in endings if it.code != it.expected
    ]
    found += [
        f"{it.pod} ended {it.seconds:.0f} s after the order, and would have been killed after {it.grace_seconds:g} s"
        for it in endings
        if it.seconds >= it.grace_seconds
    ]
    return found


def unhealthy(states: Mapping[str, bool]) -> list[str]:
    """By the platform's own health checks."""
    return [f"{pod} is not healthy" for pod, healthy in states.items() if not healthy]


def lost(before: float, after: float) -> list[str]:
    """Iterations that were seen, and those that the server began its next life with, or has since."""
    return [f"iteration {before:.0f} was there, and now it is {after:.0f}"] if after < before else []


def large_layer(image: str, size_bytes: float) -> list[str]:
    """Of an image that differs from another one in the code only."""
    if size_bytes <= LAYER_BYTES:
        return []
    return [f"a change of code is {size_bytes / 1e6:.0f} MB of {image} anew, and {LAYER_BYTES / 1e6:.0f} are the most"]
