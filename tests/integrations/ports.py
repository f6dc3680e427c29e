"""Ports for programs that must be told theirs."""

import random
import socket

# Below those that systems give out. A port of theirs may be given to somebody else besides: gRPC's servers share theirs
# with any that asks for it.
_RANGE = range(20000, 32000)


def free_ports(count: int) -> list[int]:
    """Ports that nobody has at the moment, on any address."""
    found: list[int] = []
    drawn = random.SystemRandom()
    while len(found) < count:
        port = drawn.choice(_RANGE)
        with socket.socket() as tried:
            try:
                tried.bind(("", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found
